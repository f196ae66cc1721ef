"""Two checkpoints compared: the numbers against plain torch."""

import json
import math
import shutil

import pytest
import torch
from made_checkpoints import separate, two_layers, write_checkpoint
from quantised_checkpoints import gpt_oss, quantised
from safetensors.torch import load_file, save_file

from coterie.convert import compare as comparing
from coterie.convert import convert_cpu
from coterie.convert import tensors as tensors_of_checkpoint
from coterie.convert.compare import compare
from coterie.convert.dequantize import dequantize
from coterie.errors import ArgumentError, CheckpointError


def changed(folder, other, change):
    """A copy of a checkpoint of one file, its tensors changed."""
    shutil.copytree(folder, other)
    tensors = load_file(other / "model.safetensors")
    change(tensors)
    save_file(tensors, other / "model.safetensors")
    return other


@pytest.fixture
def folder(tmp_path):
    return two_layers(tmp_path / "a")[0]


def test_the_same_in_other_files(tmp_path, folder):
    tensors = load_file(folder / "model.safetensors")
    other = write_checkpoint(tmp_path / "b", tensors, shards=3)
    steps = []
    found = compare(folder, other, progress=lambda *step: steps.append(step))
    assert found.same and len(found.errors) == len(tensors) == len(steps)
    assert all(error.largest == error.relative == 0 for error in found.errors)
    assert steps[-1][4] == steps[-1][5] == sum(tensor.nbytes for tensor in tensors.values())


def test_names_and_shapes(tmp_path, folder):
    def change(tensors):
        tensors["new"] = tensors.pop("lm_head.weight")
        tensors["model.embed_tokens.weight"] = torch.zeros(2, 3)

    found = compare(folder, changed(folder, tmp_path / "b", change))
    assert (found.only_a, found.only_b) == (("lm_head.weight",), ("new",))
    assert found.shapes == {"model.embed_tokens.weight": ((50, 64), (2, 3))}
    assert not found.same and not found.beyond


def test_errors(tmp_path, folder, monkeypatch):
    name = "model.embed_tokens.weight"
    monkeypatch.setattr(tensors_of_checkpoint, "CHUNK", 1000)
    original = load_file(folder / "model.safetensors")[name].double()
    noise = torch.randn(original.shape, generator=torch.Generator().manual_seed(0)).double() * 0.01

    def change(tensors):
        tensors[name] = (original + noise).float()

    other = changed(folder, tmp_path / "b", change)
    apart = load_file(other / "model.safetensors")[name].double() - original
    expected = (apart.norm() / original.norm()).item()
    for tolerance, same in ((0, False), (expected * 0.99, False), (expected * 1.01, True)):
        found = compare(folder, other, tolerance)
        assert found.same == same
    (error,) = [error for error in found.errors if error.largest]
    assert error.name == name and error.dtypes == ("BF16", "F32")
    assert error.largest == apart.abs().max().item()
    assert error.relative == pytest.approx(expected, rel=1e-9)


def test_numbers_that_are_none(tmp_path, folder):
    def spoil(value, *names):
        def change(tensors):
            for name in names:
                tensors[name][0, 0] = value

        return change

    names = "lm_head.weight", "model.embed_tokens.weight"
    a = changed(folder, tmp_path / "b", spoil(math.nan, *names))
    b = changed(folder, tmp_path / "c", spoil(math.nan, names[0]))
    found = compare(a, b)
    assert [error.name for error in found.beyond] == [names[1]]
    assert found.beyond[0].largest == found.beyond[0].relative == math.inf
    assert compare(a, a).same and [e.name for e in compare(b, a, 1e9).beyond] == [names[1]]


def test_zeros_and_other_dtypes(tmp_path):
    tensors = {
        "zeros": torch.zeros(4), "ints": torch.tensor([1, 2**40]), "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3), "one": torch.tensor(2.5),
    }  # fmt: skip
    a = write_checkpoint(tmp_path / "a", tensors)
    others = {"zeros": torch.tensor([0, 0, 1e-9, 0]), "ints": torch.tensor([1, 2**40 + 1])}
    b = write_checkpoint(tmp_path / "b", tensors | others)
    assert compare(a, a).same
    found = {error.name: error for error in compare(a, b).errors}
    assert found["zeros"].relative == math.inf and found["ints"].largest == 1
    assert found["flags"].largest == found["empty"].largest == found["one"].largest == 0


def test_quantised_weights_are_numbers(tmp_path):
    tensors, config, _ = quantised("GPTQ")
    source = write_checkpoint(tmp_path / "in", tensors, config)
    dequantize(source, tmp_path / "out")
    found = compare(source, tmp_path / "out", 0.003)
    assert found.same and 1e-4 < max(error.relative for error in found.errors) < 0.003
    assert not compare(source, tmp_path / "out").same
    source = write_checkpoint(tmp_path / "stacks", *gpt_oss()[:2])
    dequantize(source, tmp_path / "plain")
    assert compare(source, tmp_path / "plain").same  # bf16 holds mxfp4


def test_packed_checkpoints(tmp_path, folder):
    for name, method in (("a4", "int4"), ("b4", "int4"), ("a8", "int8")):
        convert_cpu(folder, tmp_path / name, method)
    assert compare(tmp_path / "a4", tmp_path / "b4").same
    assert compare(tmp_path / "a4", tmp_path / "a8").shapes
    assert compare(folder, tmp_path / "a4").only_b[0] == "blk.0.ffn_exps.0"


def test_pieces_cut_in_different_places():
    first = (torch.arange(10.0)[i : i + 3] for i in range(0, 10, 3))
    second = (torch.arange(10.0)[i : i + 4] for i in range(0, 10, 4))
    pairs = list(comparing._pairs(first, second))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.cat([a for a, _ in pairs]).tolist() == list(range(10))


def test_mistakes(tmp_path, folder):
    with pytest.raises(ArgumentError, match="--tolerance is -1"):
        compare(folder, folder, -1)
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        compare(folder, tmp_path / "nowhere")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "novel"}}
    with pytest.raises(CheckpointError, match="quantised by novel"):
        compare(folder, write_checkpoint(tmp_path / "b", separate("x", {"up": torch.zeros(1, 2, 2)}), config))
