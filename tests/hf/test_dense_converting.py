"""`convert` with packed linear layers: what a model packed while it loads has, in files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_models
import torch
from gguf_models import write_qwen
from packed_models import assert_same_bytes, logits
from quantised_checkpoints import METHODS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from typer.testing import CliRunner

import coterie
from coterie import tiny
from coterie.checkpoints.tensorfile import TensorFile
from coterie.cli import app
from coterie.convert import finished_layers
from coterie.convert.compare import compare
from coterie.convert.dequantize import dequantize
from coterie.errors import ArgumentError, CheckpointError, UnsupportedModelError
from coterie.hf.converting import convert, verify_linears
from coterie.hf.dense import packed_linears


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_linears(one, other) -> None:
    pairs = zip(packed_linears(one), packed_linears(other), strict=True)
    assert all(a == b and torch.equal(x.packed, y.packed) for (a, x), (b, y) in pairs)


@pytest.mark.parametrize(
    "family", ["qwen2_moe", "qwen3_next", "deepseek_v3", "mixtral", "gpt_oss", "hunyuan_v1_moe", "minimax_m2"]
)
def test_as_packed_while_loading(family, checkpoint, tmp_path):
    source = checkpoint(family)
    report = convert(source, tmp_path / "out", quant_method="int4", dense="int8", dense_skip="o_proj")
    expected = coterie.from_pretrained(source, experts="int4", dense="int8", dense_skip="o_proj")
    model = coterie.from_pretrained(tmp_path / "out", mmap=True)
    assert torch.equal(logits(model), logits(expected))
    assert_same_bytes(model, expected)
    assert_same_linears(model, expected)
    assert report.linear_errors.count == len(list(packed_linears(expected))) > 5
    expected.save_pretrained(tmp_path / "saved")
    names = [set(TensorFile(tmp_path / folder / "linears-00000.safetensors").entries) for folder in ("out", "saved")]
    assert names[0] == names[1]


def test_a_tied_head(tmp_path):
    convert(tiny.PATH, tmp_path / "out", dense="int8")
    ids = torch.arange(5, 37)[None]
    model, expected = coterie.from_pretrained(tmp_path / "out"), coterie.from_pretrained(tiny.PATH, dense="int8")
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["dense"] == "int8" and config["tie_word_embeddings"]
    rest = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert "model.embed_tokens.weight" in rest and not any("_proj" in name for name in rest)


@pytest.mark.parametrize(
    ("kind", "auto", "count"),
    [
        ("qwen3_vl_moe", AutoModelForImageTextToText, 17),
        ("qwen3_5_moe", AutoModelForImageTextToText, 22),
        ("qwen3_5_moe", AutoModelForCausalLM, 16),
    ],
)
def test_multimodal_models(kind, auto, count, tmp_path):
    """A vision tower is packed too, and left aside by a class that has none."""
    tiny_models.make_vision(kind).save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "out", dense="int8")
    model = coterie.from_pretrained(tmp_path / "out", auto_class=auto)
    expected = coterie.from_pretrained(tmp_path / "plain", auto_class=auto, dense="int8")
    assert torch.equal(logits(model), logits(expected))
    assert_same_linears(model, expected)
    expected.save_pretrained(tmp_path / "saved")
    assert len(list(packed_linears(coterie.from_pretrained(tmp_path / "saved", auto_class=auto)))) == count


def test_errors_are_those_of_the_weights(tmp_path):
    report = convert(tiny.PATH, tmp_path / "out", dense="int4")
    plain = coterie.from_pretrained(tiny.PATH, experts="bf16")
    errors = {}
    for name, linear in packed_linears(coterie.from_pretrained(tmp_path / "out")):
        weight = plain.get_submodule(name).weight.float()
        errors[f"{name}.weight"] = ((linear.dequantize() - weight).norm() / weight.norm()).item()
    found = report.linear_errors
    assert found.worst == pytest.approx(max(errors.values()), rel=1e-4)
    assert found.worst_name == max(errors, key=errors.get)
    assert found.mean == pytest.approx(sum(errors.values()) / len(errors), rel=1e-4)
    stored = TensorFile(tmp_path / "out" / "linears-00000.safetensors").entries.values()
    assert report.linear_bytes == sum(entry.nbytes for entry in stored)


def test_gguf(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    file = write_qwen(tmp_path / "model.gguf", tiny_models.make("qwen3_moe", torch.float32, rope_parameters=rope))
    convert(file, tmp_path / "out", dense="int8")
    model, expected = coterie.from_pretrained(tmp_path / "out"), coterie.from_pretrained(file, dense="int8")
    assert torch.equal(logits(model), logits(expected))
    assert_same_linears(model, expected)
    found = verify_linears(tmp_path / "out", file)
    assert found.count == 9 and 0.001 < found.worst < 0.02
    other = write_qwen(tmp_path / "other.gguf", tiny_models.make("qwen3_moe", torch.float32, vocab_size=97))
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight: expected \[97, 64\], its shape is \[96, 64\]"):
        convert(other, tmp_path / "wider", dense="int8")
        verify_linears(tmp_path / "wider", file)


def quantised(folder: Path, method: str) -> dict[str, torch.Tensor]:
    """Writes a qwen3_moe whose experts and attention are quantised; what attention's weights stand for, by name."""
    make, quantization, _ = METHODS[method]
    sizes = {"hidden_size": 128, "moe_intermediate_size": 128, "head_dim": 32}
    tiny_models.make("qwen3_moe", **sizes).save_pretrained(folder)
    random, dense = torch.Generator().manual_seed(0), {}

    def quantise(tensors):
        for name in [name for name in tensors if re.search(r"(experts\.\d+|self_attn)\.\w+_proj\.weight", name)]:
            parts, dense[name] = make(random, *tensors.pop(name).shape)
            tensors |= {f"{name.removesuffix('.weight')}.{part}": value.clone() for part, value in parts.items()}

    config = json.loads((broken(folder, quantise) / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return {name: weight for name, weight in dense.items() if "self_attn" in name}


KEPT = {
    "fp8 by blocks": "fp8_block",
    "compressed-tensors fp8 by rows": "fp8_channel",
    "compressed-tensors int4": "int4",
    "compressed-tensors mxfp4": "mxfp4",
    "ModelOpt nvfp4": "nvfp4",
}


@pytest.mark.parametrize("method", KEPT)
@pytest.mark.parametrize("kept", [True, False])
def test_quantised(tmp_path, method, kept):
    """What is quantised in the format asked for keeps its codes; what is in another is dequantised, and packed."""
    dense = quantised(tmp_path / "in", method)
    asked = KEPT[method] if kept else "q8_0"
    report = convert(tmp_path / "in", tmp_path / "out", dense=asked)
    model, expected = coterie.from_pretrained(tmp_path / "out"), coterie.from_pretrained(tmp_path / "in", dense=asked)
    assert torch.equal(logits(model), logits(expected))
    assert_same_linears(model, expected)
    linears = dict(packed_linears(model))
    for name, weight in dense.items():
        found = linears[name.removesuffix(".weight")].dequantize()
        if kept:
            torch.testing.assert_close(found, weight, rtol=1e-6, atol=0)
        else:
            assert 0 < ((found - weight).norm() / weight.norm()).item() < 0.01
    assert report.linear_errors.count == len(linears) == len(dense) + 1  # and the head, which is plain


def test_resumed(tmp_path):
    def stop(layer, *_):
        if layer == 2:
            raise KeyboardInterrupt

    convert(tiny.PATH, tmp_path / "whole", dense="int8")
    with pytest.raises(KeyboardInterrupt):
        convert(tiny.PATH, tmp_path / "out", dense="int8", progress=stop)
    assert tuple(finished_layers(tmp_path / "out")) == (0,)
    with pytest.raises(ArgumentError, match="with linear layers int8, this one has as they are"):
        convert(tiny.PATH, tmp_path / "out", resume=True)
    with pytest.raises(ArgumentError, match="this one has int8 without o_proj"):
        convert(tiny.PATH, tmp_path / "out", dense="int8", dense_skip="o_proj", resume=True)
    convert(tiny.PATH, tmp_path / "out", dense="int8", resume=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# --- mistakes, of which nothing is written ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense": "int3"}, "unknown format 'int3'"),
        ({"dense_skip": "o_proj"}, "dense_skip: expected dense="),
        ({"dense": "int8", "dense_skip": ["q_prj"]}, "'q_prj' matches none of the 17 .*; the nearest name is q_proj"),
        ({"dense": "int8", "dense_skip": "("}, "is not a regular expression"),
        ({"dense": "int8", "layers": [0]}, "loose layers are experts alone"),
        ({"dense": "int8", "loose": True}, "loose layers are experts alone"),
    ],
)
def test_mistakes(options, message, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        convert(tiny.PATH, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def broken(folder: Path, change) -> Path:
    """The folder of a plain checkpoint after `change` of its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_groups_that_do_not_divide(tmp_path):
    tiny_models.make("qwen3_moe", head_dim=12).save_pretrained(tmp_path / "plain")
    with pytest.raises(ArgumentError, match=r"o_proj has 48 columns, not a multiple.*dense_skip=\['o_proj'\]"):
        convert(tmp_path / "plain", tmp_path / "out", dense="int4")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_missing(plain, tmp_path):
    broken(plain, lambda tensors: tensors.pop("model.layers.1.self_attn.q_proj.weight"))
    with pytest.raises(CheckpointError, match=r"no tensor for model\.layers\.1\.self_attn\.q_proj\.weight"):
        convert(plain, tmp_path / "out", dense="int8")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_no_format_holds(plain, tmp_path):
    broken(plain, lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].fill_(torch.inf))
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj\.weight: .*NaN or Inf.*--dense-skip"):
        convert(plain, tmp_path / "out", dense="int8")
    with pytest.raises(CheckpointError, match="was not finished"):
        coterie.from_pretrained(tmp_path / "out")


def test_a_model_that_transformers_does_not_know(plain, tmp_path):
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config | {"model_type": "nobodys"}))
    with pytest.raises(UnsupportedModelError, match="model_type is 'nobodys'"):
        convert(plain, tmp_path / "out", dense="int8")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path):
    command = ["convert", "cpu", "-i", str(tiny.PATH), "-o", str(tmp_path / "out"), "--dense", "int8"]
    ran = CliRunner().invoke(app, [*command, "--dense-skip", "o_proj", "--dense-skip", "lm_head"])
    assert ran.exit_code == 0, ran.output
    assert "12 linear layers packed too, with a mean error of 0.006" in " ".join(ran.output.split())
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["dense"], stored["dense_skip"]) == ("int8", ["o_proj", "lm_head"])
    assert len(list(packed_linears(coterie.from_pretrained(tmp_path / "out")))) == 12


# --- the other tools, of such folders ---


def test_compared_by_numbers(tmp_path, monkeypatch):
    """A packed linear layer counts as the weight that it stands for, piece by piece."""
    monkeypatch.setattr("coterie.convert.linears.CHUNK", 4 * 128 * 64)
    for dense in ("bf16", "int8"):
        convert(tiny.PATH, tmp_path / dense, dense=dense)
    convert(tiny.PATH, tmp_path / "plain")
    exact, found = (compare(tmp_path / dense, tmp_path / "plain") for dense in ("bf16", "int8"))
    assert exact.only_a == found.only_a == ("lm_head.weight",) and not exact.beyond and not found.shapes
    assert len(found.beyond) == 16 and all(0.005 < error.relative < 0.008 for error in found.beyond)
    errors = {error.name: error.relative for error in compare(tmp_path / "bf16", tmp_path / "int8").errors}
    plain, linears = coterie.from_pretrained(tiny.PATH), packed_linears(coterie.from_pretrained(tmp_path / "int8"))
    for name, linear in linears:
        weight = plain.get_submodule(name).weight.float()
        error = ((linear.dequantize() - weight).norm() / weight.norm()).item()
        assert errors[f"{name}.weight"] == pytest.approx(error, rel=1e-4)


def test_verified(tmp_path):
    report = convert(tiny.PATH, tmp_path / "out", dense="int4", dense_skip="k_proj")
    found = verify_linears(tmp_path / "out", tiny.PATH)
    assert found.count == 13 and found.worst_name == report.linear_errors.worst_name
    assert found.worst == pytest.approx(report.linear_errors.worst, rel=1e-4)
    convert(tiny.PATH, tmp_path / "plain")
    assert verify_linears(tmp_path / "plain", tiny.PATH).count == 0
    ran = CliRunner().invoke(app, ["convert", "verify", str(tmp_path / "out"), str(tiny.PATH)])
    assert ran.exit_code == 0 and "13 linear layers: mean 0.0" in " ".join(ran.output.split())


def test_verified_against_something_else(checkpoint, tmp_path):
    convert(checkpoint("qwen3_moe"), tmp_path / "out", dense="int8")
    model = tiny_models.make("qwen3_moe")
    model.model.layers[1].self_attn.v_proj.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "other")
    ran = CliRunner().invoke(app, ["convert", "verify", str(tmp_path / "out"), str(tmp_path / "other")])
    said = " ".join(ran.output.split())
    assert ran.exit_code == 1 and "worst 0.5, model.layers.1.self_attn.v_proj.weight: beyond 0.3" in said
    tiny_models.make("qwen3_moe", num_key_value_heads=4).save_pretrained(tmp_path / "wider")
    with pytest.raises(CheckpointError, match=r"k_proj\.weight: expected \[32, 64\], its shape is \[64, 64\]"):
        verify_linears(tmp_path / "out", tmp_path / "wider")


def test_what_refuses_a_packed_checkpoint(tmp_path):
    convert(tiny.PATH, tmp_path / "packed", dense="int8")
    with pytest.raises(ArgumentError, match="is packed already"):
        convert(tmp_path / "packed", tmp_path / "out", dense="int4")
    with pytest.raises(ArgumentError, match="is packed by coterie"):
        dequantize(tmp_path / "packed", tmp_path / "out")
    assert not (tmp_path / "out").exists()
