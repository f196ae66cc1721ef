"""A file appears whole, or not at all."""

import os
import resource

import pytest
import torch
from safetensors import safe_open

from coterie.checkpoints.tensorwriter import TensorWriter, write_text
from coterie.errors import CheckpointError

LAYOUT = [("a", "U8", (100,)), ("b", "BF16", (3, 4)), ("empty", "F32", (0,))]
A = torch.arange(100, dtype=torch.uint8)
B = torch.randn(3, 4).bfloat16()


def test_safetensors_reads_it(tmp_path):
    with TensorWriter(tmp_path / "x.safetensors", LAYOUT, {"who": "naïve"}) as writer:
        writer.write("b", B.view(-1).view(torch.uint8))
        for chunk in A.split(33):
            writer.write("a", chunk)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("a"), A)
        assert torch.equal(file.get_tensor("b"), B)
    assert (tmp_path / "x.safetensors").stat().st_size == writer.nbytes
    assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") % 64 == 56
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_an_exception_leaves_the_file_before(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), TensorWriter(path, LAYOUT, {}) as writer:
        writer.write("a", A)
        raise RuntimeError
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_unwritten_and_overfull_tensors(tmp_path):
    with (
        pytest.raises(CheckpointError, match="1 tensors were not written: 'b'"),
        TensorWriter(tmp_path / "x", LAYOUT, {}) as writer,
    ):
        writer.write("a", A)
    with (
        pytest.raises(CheckpointError, match="'a' takes 100 more bytes, got 101"),
        TensorWriter(tmp_path / "x", LAYOUT, {}) as writer,
    ):
        writer.write("a", torch.zeros(101, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="two tensors are named 'a'"):
        TensorWriter(tmp_path / "x", LAYOUT[:1] * 2, {})
    assert os.listdir(tmp_path) == []


def test_the_system_refuses(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with (
            pytest.raises(CheckpointError, match=r"cannot write .*x: File too large"),
            TensorWriter(tmp_path / "x", [("a", "U8", (10_000,))], {}) as writer,
        ):
            writer.write("a", torch.zeros(10_000, dtype=torch.uint8))
        with pytest.raises(CheckpointError, match=r"cannot write .*t: File too large"):
            write_text(tmp_path / "t", "x" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == []


def test_no_such_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot write .*No such file"):
        TensorWriter(tmp_path / "no" / "x", LAYOUT, {}).__enter__()
