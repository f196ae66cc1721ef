"""Quantised checkpoints in bf16: every weight is the number that its code stands for, rounded."""

import json
import os
import signal

import forks
import pytest
import torch
from made_checkpoints import CONFIG, two_layers, write_checkpoint
from quantised_checkpoints import METHODS, STEM, E, gpt_oss, quantised
from safetensors.torch import load_file

from coterie import Experts
from coterie.checkpoints.folder import INDEX
from coterie.convert import convert_cpu
from coterie.convert.dequantize import dequantize
from coterie.errors import ArgumentError, CheckpointError, CoterieError


def loaded(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def made(folder, method="fp8 by blocks", shards=2):
    tensors, config, dense = quantised(method)
    return write_checkpoint(folder, tensors, config, shards), tensors, dense


@pytest.mark.parametrize("method", METHODS)
def test_weights(tmp_path, method):
    source, tensors, dense = made(tmp_path / "in", method)
    (source / "hf_quant_config.json").write_text("{}")
    done = dequantize(source, tmp_path / "out")
    assert done.matrices == len(dense) and done.whole
    found = loaded(tmp_path / "out")
    plain = {name for name in tensors if not any(name.startswith(f"{base}.") for base in dense)} | {
        name for name in tensors if name.endswith(".bias")
    }
    assert found.keys() == plain | {f"{base}.weight" for base in dense}
    assert all(torch.equal(found[name], tensors[name]) for name in plain)
    rtol = 2**-7 if method == "compressed-tensors nvfp4" else 0  # divides by a scale whose reciprocal is rounded
    for base, weight in dense.items():
        assert found[f"{base}.weight"].dtype == torch.bfloat16
        torch.testing.assert_close(found[f"{base}.weight"], weight.bfloat16(), rtol=rtol, atol=0)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == CONFIG | {"torch_dtype": "bfloat16"}
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == done.bytes == sum(tensor.nbytes for tensor in found.values())
    assert done.source_bytes == sum(tensor.nbytes for tensor in tensors.values())


def test_it_is_a_checkpoint_like_any_other(tmp_path):
    source, _, dense = made(tmp_path / "in")
    dequantize(source, tmp_path / "out")
    experts = Experts.open(tmp_path / "out", 1)
    assert experts.format == "bf16"
    expected = torch.stack([dense[f"{STEM.format(1)}.{e}.up_proj"] for e in range(E)]).bfloat16().float()
    assert torch.equal(experts.dequantize()[1], expected)
    report = convert_cpu(tmp_path / "out", tmp_path / "packed", "bf16", input_type="bf16")
    assert all(error.worst == 0 for error in report.errors.values())


def test_gpt_oss(tmp_path):
    """Its stacks become those of its model in bf16, [E, in, out] with gate and up in turns."""
    tensors, config, dense = gpt_oss(layers=2)
    source = write_checkpoint(tmp_path / "in", tensors, config, shards=2)
    dequantize(source, tmp_path / "out")
    found = loaded(tmp_path / "out")
    for layer, weights in enumerate(dense):
        stem = STEM.format(layer)
        first = found[f"{stem}.gate_up_proj"]
        assert torch.equal(first[:, :, 0::2], weights["gate"].mT.bfloat16())
        assert torch.equal(first[:, :, 1::2], weights["up"].mT.bfloat16())
        assert torch.equal(found[f"{stem}.down_proj"], weights["down"].mT.bfloat16())
        assert torch.equal(found[f"{stem}.down_proj_bias"], tensors[f"{stem}.down_proj_bias"])
        opened = Experts.open(tmp_path / "out", layer)
        assert torch.equal(opened.dequantize()[1], weights["up"].bfloat16().float())
        assert opened.activation.limit == 7.0
    assert not any("blocks" in name or "scales" in name for name in found)


def test_some_files_then_the_others(tmp_path):
    source, _, _ = made(tmp_path / "in", shards=3)
    dequantize(source, tmp_path / "whole")
    names = sorted(path.name for path in source.glob("*.safetensors"))
    out = tmp_path / "out"
    done = dequantize(source, out, files=names[:1])
    assert not done.whole and os.listdir(out) == names[:1]
    with pytest.raises(ArgumentError, match=r"00001-of-00003.safetensors is there already: leave it out"):
        dequantize(source, out, files=names)
    assert os.listdir(out) == names[:1]
    (out / names[0]).write_text("spoiled")
    assert dequantize(source, out, files=names[:2], overwrite=True).files == tuple(names[:2])
    assert dequantize(source, out, files=names[2:]).whole
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }


def test_progress(tmp_path):
    source, _, _ = made(tmp_path / "in")
    steps = []
    done = dequantize(source, tmp_path / "out", progress=lambda *step: steps.append(step))
    assert steps[-1][:2] == (2, 2) and steps[-1][2] == steps[-1][3] and steps[-1][4:] == (done.bytes, done.bytes)
    assert [step[4] for step in steps] == sorted(step[4] for step in steps)


def test_a_checkpoint_in_its_place(tmp_path):
    source, _, _ = made(tmp_path / "in")
    dequantize(source, tmp_path / "out")
    with pytest.raises(ArgumentError, match="is not empty"):
        dequantize(source, tmp_path / "out")
    (tmp_path / "out" / INDEX).unlink()
    dequantize(source, tmp_path / "out", overwrite=True)
    dequantize(source, tmp_path / "again", overwrite=True)
    assert loaded(tmp_path / "out").keys() == loaded(tmp_path / "again").keys()
    assert (tmp_path / "out" / INDEX).read_bytes() == (tmp_path / "again" / INDEX).read_bytes()
    with pytest.raises(ArgumentError, match="is the source"):
        dequantize(source, source, overwrite=True)


def test_what_cannot_be_dequantised(tmp_path):
    plain, _ = two_layers(tmp_path / "plain")
    convert_cpu(plain, tmp_path / "packed")
    source, _, _ = made(tmp_path / "in")
    for folder, options, message, error in (
        (tmp_path / "nowhere", {}, "nowhere does not exist", CheckpointError),
        (plain, {}, "plain is not quantised", ArgumentError),
        (tmp_path / "packed", {}, "is packed by coterie", ArgumentError),
        (plain / "model.safetensors", {}, "not a model folder", CheckpointError),
        (source, {"files": ["x"]}, "--files: x is no file of tensors .* it has model-00001", ArgumentError),
        (source, {"files": []}, "no files were asked for", ArgumentError),
    ):
        with pytest.raises(error, match=message):
            dequantize(folder, tmp_path / "out", **options)
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        dequantize(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_killed(tmp_path):
    """It leaves no folder, and the next run takes away what it left beside."""
    source, _, _ = made(tmp_path / "in")
    script = f"""
import os, signal
from coterie.convert.dequantize import dequantize
def kill(part, *_):
    if part == 2:
        os.kill(os.getpid(), signal.SIGKILL)
dequantize({str(source)!r}, {str(tmp_path / "out")!r}, progress=kill)
"""
    assert forks.run(script).returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and len(os.listdir(tmp_path)) == 2
    with pytest.raises(CoterieError):
        Experts.open(tmp_path / "out")
    dequantize(source, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
