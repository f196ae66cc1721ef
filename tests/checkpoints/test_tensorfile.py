"""Any file that is not exactly what its header promises is refused, and the error says where."""

import gc
import json
import os

import pytest
import torch
from safetensors.torch import save_file

from coterie.checkpoints.tensorfile import TensorFile
from coterie.errors import CheckpointError, MissingTensorError


def file_of(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def tensor(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_reads_what_safetensors_writes(tmp_path):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randn(7),
        "c": torch.arange(6, dtype=torch.uint8).view(2, 3),
        "empty": torch.zeros(0, 4),
        "scalar": torch.tensor(2.5, dtype=torch.float16),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.metadata == {"k": "v"}
    assert set(file.entries) == set(tensors)
    for name, expected in tensors.items():
        assert file.tensor(name).dtype == expected.dtype
        assert torch.equal(file.tensor(name), expected)
        assert torch.equal(file.bytes(name), expected.reshape(-1).view(torch.uint8))


def test_views_survive_release_and_the_reader(tmp_path):
    big = torch.randn(64, 4096)
    save_file({"big": big}, tmp_path / "x.safetensors")
    file = TensorFile(tmp_path / "x.safetensors")
    view = file.tensor("big")
    file.release("big", 3, 64)
    file.release("big")
    del file
    assert torch.equal(view, big)


def test_unaligned_tensors_are_copied(tmp_path):
    values = torch.tensor([1.0, 2.0])
    header = {"pad": tensor(shape=(1,), offsets=(0, 1)), "x": tensor("F32", (2,), (1, 9))}
    file = TensorFile(file_of(tmp_path / "x", header, b"\0" + values.numpy().tobytes()))
    assert torch.equal(file.tensor("x"), values)


MALFORMED = {
    "empty": (b"", "shorter than the 8"),
    "only a length": ((5).to_bytes(8, "little"), "truncated: header of 5 bytes"),
    "huge header": ((10**12).to_bytes(8, "little") + b"{}", "header of 1000000000000 bytes"),
}


@pytest.mark.parametrize("content, message", MALFORMED.values(), ids=MALFORMED)
def test_bytes_that_are_no_file(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        TensorFile(tmp_path / "x")


HEADERS = {
    "not UTF-8": (b"\xff\xfe{}", "not valid JSON"),
    "not JSON": (b"{nonsense", "not valid JSON"),
    "nested": (b"[" * 100_000, "not valid JSON"),
    "a huge number": (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
    "a list": ([1], "JSON list, expected an object"),
    "same name twice": (b'{"a": 1, "a": 1}', "duplicate key a"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, "expected an object of strings"),
    "entry is no object": ({"a": 3}, "tensor 'a': expected an object of dtype"),
    "extra key": ({"a": tensor() | {"more": 1}}, "expected an object of dtype"),
    "unknown dtype": ({"a": tensor("U9")}, "expected a dtype of .* found 'U9'"),
    "dtype is a list": ({"a": tensor(["U8"])}, "expected a dtype"),
    "negative shape": ({"a": tensor(shape=(-4,))}, "expected a shape"),
    "shape of booleans": ({"a": tensor(shape=(True, 4))}, "expected a shape"),
    "shape of floats": ({"a": tensor(shape=(4.0,))}, "expected a shape"),
    "too many dimensions": ({"a": tensor(shape=(1,) * 65)}, "at most 64 sizes"),
    "one offset": ({"a": tensor(offsets=(4,))}, "two byte positions"),
    "NaN offset": (b'{"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, NaN]}}', "two byte positions"),
    "size differs from shape": ({"a": tensor(shape=(5,))}, "expected 5 bytes for U8 .* found '4 bytes'"),
    "ends before it starts": ({"a": tensor(offsets=(4, 0))}, "found '-4 bytes'"),
    "half a byte": ({"a": tensor("F4", (3,), (0, 2))}, "expected 1.5 bytes"),
    "overlap": ({"a": tensor(), "b": tensor(offsets=(2, 6))}, "'b': overlaps"),
    "gap": ({"a": tensor(offsets=(1, 5))}, "'a': leaves a gap"),
    "past the end": ({"a": tensor(), "b": tensor(shape=(9,), offsets=(4, 13))}, "truncated in tensor 'b'"),
    "data left over": ({}, "the tensors take 0 bytes, the file has 8"),
    "lone surrogate": (b'{"\\ud800": 1}', r"tensor '\\ud800'"),
}


@pytest.mark.parametrize("header, message", HEADERS.values(), ids=HEADERS)
def test_headers_that_lie(tmp_path, header, message):
    with pytest.raises(CheckpointError, match=message) as raised:
        TensorFile(file_of(tmp_path / "x", header, b"\0" * 8))
    assert str(tmp_path / "x") in str(raised.value)
    str(raised.value).encode("ascii")


def test_not_there_or_not_a_file(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        TensorFile(tmp_path / "missing")
    with pytest.raises(CheckpointError, match="directory"):
        TensorFile(tmp_path)


def test_missing_tensor_and_one_torch_lacks(tmp_path):
    file = TensorFile(file_of(tmp_path / "x", {"a": tensor("F4", (8,), (0, 4))}, b"\0" * 4))
    with pytest.raises(MissingTensorError, match="no tensor 'b'"):
        file.tensor("b")
    with pytest.raises(CheckpointError, match="F4 cannot be read by torch"):
        file.tensor("a")


def descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("way", ["mapped", "read", "read after mapping"])
def test_a_file_replaced_after_its_header_was_read(tmp_path, way):
    """Header and data are of one file, whatever has its name by then."""
    path, values = tmp_path / "x.safetensors", torch.arange(64, dtype=torch.uint8)
    save_file({"a": values, "b": values + 1}, path)
    file = TensorFile(path)
    save_file({"a": values + 100, "b": values + 100}, tmp_path / "y.safetensors")
    os.replace(tmp_path / "y.safetensors", path)
    if way != "read":
        assert torch.equal(file.tensor("b"), values + 1)
    if way != "mapped":
        found = torch.zeros(64, dtype=torch.uint8)
        file.read_into("b", found.numpy().data)
        assert torch.equal(found, values + 1)


def test_one_descriptor_a_file(tmp_path):
    save_file({"a": torch.arange(4)}, tmp_path / "x.safetensors")
    before = descriptors()
    files = [TensorFile(tmp_path / "x.safetensors") for _ in range(50)]
    assert descriptors() <= before + 50
    views = [file.tensor("a") for file in files]
    assert descriptors() <= before + 50
    del files, views
    assert descriptors() == before
    (tmp_path / "x.safetensors").write_bytes(b"broken")
    with pytest.raises(CheckpointError):
        TensorFile(tmp_path / "x.safetensors")
    assert descriptors() == before
