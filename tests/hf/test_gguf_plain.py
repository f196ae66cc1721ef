"""GGUF files as plain checkpoints: dequantised, and compared, under the names of the original."""

from __future__ import annotations

import json
import os

import pytest
import torch
from gguf_families import ARCHITECTURES, write_family
from gguf_models import MIXED, PARTS, experts, write_gguf, write_qwen, write_qwen35
from gpt_oss_checkpoints import write_as_gguf, write_mxfp4
from peaks import growth, needs_peaks
from safetensors.torch import load_file
from test_gguf_minimax import write as write_minimax
from tiny_models import STRUCTURES, make, prompt
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import coterie
from coterie.checkpoints import tensorwriter
from coterie.checkpoints.folder import INDEX
from coterie.checkpoints.gguf_file import GgufFile
from coterie.cli import app
from coterie.convert import rest
from coterie.convert.dequantize import dequantize as dequantize_folder
from coterie.errors import ArgumentError, CheckpointError, UnsupportedModelError
from coterie.hf.converting import compare, convert, dequantize
from coterie.hf.gguf.config import open_tokenizer

ROPE = {"rope_type": "default", "rope_theta": 500000.0}
Q4_K_M = {"gate": "Q4_K", "up": "Q4_K", "down": ["Q6_K", "Q4_K"]}
REST = {"": "Q8_0", "lm_head": "Q6_K", "model.layers.0.self_attn.q_proj": "F16"}


def qwen3(**changes):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64}
    return make("qwen3_moe", torch.float32, rope_parameters=ROPE, **sizes | changes)


def loaded(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def said(*arguments):
    ran = CliRunner().invoke(app, ["convert", *map(str, arguments)])
    return ran.exit_code, " ".join(ran.output.split())


FLOATS = {
    **{family: lambda path, model: write_family(path, model) for family in STRUCTURES if family in ARCHITECTURES},
    "minimax_m2": write_minimax,
    "qwen2_moe": lambda path, model: write_qwen(path, model, "F32", "F32"),
    "qwen3_moe": lambda path, model: write_qwen(path, model, "F32", "F32"),
}


@pytest.mark.parametrize("family", FLOATS)
def test_the_checkpoint_that_a_file_was_made_of(family, tmp_path):
    """Names, shapes and numbers."""
    rope = {"rope_parameters": ROPE} if family in ("qwen2_moe", "qwen3_moe") else {}
    stock = make(family, torch.float32, tie_word_embeddings=family == "lfm2_moe", **rope)
    stock.save_pretrained(tmp_path / "original")
    file = FLOATS[family](tmp_path / "model.gguf", stock)
    done = dequantize(file, tmp_path / "out")
    assert done.whole and done.matrices == 0
    for made in (file, tmp_path / "out"):
        found = compare(tmp_path / "original", made, 1e-6)
        renamed = family == "kimi_linear"  # whose checkpoints have three convolutions for one
        assert found.same != renamed and not found.shapes and not found.beyond, (found.only_a, found.only_b)
        assert all("conv1d" in name for name in (*found.only_a, *found.only_b))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(again) is type(stock)
    for found, expected in zip(again.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_gpt_oss(tmp_path, fused):
    """Its experts are stacks with biases; MXFP4's numbers are bf16's."""
    file = write_as_gguf(tmp_path / "model.gguf", write_mxfp4(tmp_path / "original"), fused=fused)
    dequantize_folder(tmp_path / "original", tmp_path / "expected")
    dequantize(file, tmp_path / "out")
    expected, found = loaded(tmp_path / "expected"), loaded(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].float(), value.float()) for name, value in expected.items())
    assert found["model.layers.0.mlp.experts.down_proj"].dtype == torch.bfloat16
    assert compare(file, tmp_path / "original").same


def test_qwen3_5(tmp_path):
    pytest.importorskip("transformers.integrations.gguf.gguf_conversion_mapping")
    file = write_qwen35(tmp_path / "model.gguf", make("qwen3_5_moe_text", torch.float32, head_dim=32))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    stock.save_pretrained(tmp_path / "original")
    assert compare(tmp_path / "original", file).same
    dequantize(file, tmp_path / "out")
    assert compare(tmp_path / "original", tmp_path / "out").same


@pytest.mark.parametrize("kinds", [Q4_K_M, MIXED, "IQ2_XXS", "BF16"], ids=str)
def test_quantised_weights(kinds, tmp_path):
    """What is in blocks becomes bf16, and what is numbers stays."""
    stock = qwen3()
    file = write_qwen(tmp_path / "model.gguf", stock, experts=kinds, rest=REST)
    stock.save_pretrained(tmp_path / "original")
    steps = []
    done = dequantize(file, tmp_path / "out", progress=lambda *step: steps.append(step))
    found, original = loaded(tmp_path / "out"), loaded(tmp_path / "original")
    assert found.keys() == original.keys() and steps[-1][4:] == (done.bytes, done.bytes)
    for name, value in found.items():
        assert torch.equal(value, original[name].to(value.dtype)), name
        own = torch.float32 if value.ndim == 1 or name.endswith("mlp.gate.weight") else torch.bfloat16
        assert value.dtype == (torch.float16 if "layers.0.self_attn.q_proj" in name else own), name
    assert done.matrices == sum(value.dtype == torch.bfloat16 for value in found.values()) - 48 * (kinds == "BF16")
    stored = GgufFile(file)
    assert done.source_bytes == sum(map(stored.nbytes, stored.names))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.get_vocab() == open_tokenizer(stored).get_vocab()
    model = coterie.from_pretrained(tmp_path / "out", experts="bf16")
    opened = coterie.from_pretrained(file, experts="bf16", dense=None)
    with torch.no_grad():
        assert torch.equal(model(prompt()).logits, opened(prompt()).logits)


def test_a_head_that_is_the_embedding(tmp_path):
    file = write_qwen(tmp_path / "model.gguf", qwen3(tie_word_embeddings=True), experts="Q8_0")
    dequantize(file, tmp_path / "out")
    assert "lm_head.weight" not in loaded(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_shards(tmp_path, monkeypatch):
    """Of bounded size, in files that can be made apart; the index comes last."""
    file = write_qwen(tmp_path / "model.gguf", qwen3(), experts="Q8_0", files=2)
    monkeypatch.setattr(rest, "SHARD_BYTES", 2 << 20)
    dequantize(file, tmp_path / "whole")
    names = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert set(json.loads((tmp_path / "whole" / INDEX).read_text())["weight_map"].values()) == set(names)
    out = tmp_path / "out"
    assert not dequantize(file, out, files=names[1:]).whole and sorted(os.listdir(out)) == names[1:]
    with pytest.raises(ArgumentError, match="it has model-00001-of-"):
        dequantize(file, out, files=["other"])
    assert dequantize(file, out, files=names[:1]).whole
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "whole").iterdir()
    }
    with pytest.raises(ArgumentError, match="is not empty"):
        dequantize(file, out)
    dequantize(file, out, overwrite=True)


def test_the_commands(tmp_path):
    stock = qwen3()
    file = write_qwen(tmp_path / "model.gguf", stock, experts=Q4_K_M)
    stock.save_pretrained(tmp_path / "original")
    code, text = said("dequantize", "-i", file, "-o", tmp_path / "out")
    assert code == 0 and "58 weights" in text and "file 1/1" in text
    code, text = said("compare", file, tmp_path / "out", "--tolerance", "0.003")
    assert code == 0 and "58 within a relative error of 0.003" in text
    code, text = said("compare", tmp_path / "original", file)
    assert code == 0 and "69 tensors compared: 69 equal" in text
    convert(file, tmp_path / "packed", dense="own")
    assert len(compare(file, tmp_path / "packed", 4e-3).errors) == 69 - 48


def test_mistakes(tmp_path, monkeypatch):
    """Before anything is written."""
    whole = write_qwen(tmp_path / "model.gguf", qwen3(), experts="Q8_0")
    tensors, _ = experts(dict.fromkeys(PARTS, "Q8_0"))
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole.read_bytes()[:-1000])
    files = {
        cut: (CheckpointError, "cut.gguf is not a whole GGUF file: .*ends at byte"),
        write_gguf(tmp_path / "other.gguf", tensors, {"block_count": 1}, arch="phimoe"): (
            UnsupportedModelError, "does not open GGUF architecture 'phimoe'",
        ),
        write_qwen(tmp_path / "less.gguf", qwen3(), change=("blk.1.attn_k.weight", None)): (
            CheckpointError, "has no tensor for model.layers.1.self_attn.k_proj.weight",
        ),
        write_qwen(tmp_path / "words.gguf", qwen3(), metadata={"tokenizer.ggml.merges": ["no such"]}): (
            CheckpointError, "makes no tokenizer of it",
        ),
        tmp_path: (CheckpointError, "holds 5 GGUF models"),
    }  # fmt: skip
    for file, (error, message) in files.items():
        with pytest.raises(error, match=message):
            dequantize(file, tmp_path / "out")
        if "tokenizer" not in message:
            with pytest.raises(error, match=message):
                compare(whole, file)
    for options in ({"overwrite": True}, {"files": ["model.safetensors"]}):
        with pytest.raises(ArgumentError, match="is the source: choose another folder"):
            dequantize(whole, tmp_path, **options)
    with pytest.raises(ArgumentError, match="--tolerance is -1"):
        compare(whole, whole, -1)
    before = sorted(os.listdir(tmp_path))
    monkeypatch.setattr(tensorwriter.shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match="not enough space"):
        dequantize(whole, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == before


@needs_peaks
def test_memory(tmp_path):
    """It does not grow with the model: 4 MB of numbers, and 14."""
    for name, layers in (("small", 1), ("large", 4)):
        write_qwen(tmp_path / f"{name}.gguf", qwen3(num_hidden_layers=layers), experts="Q8_0")
    assert growth(lambda size, out: dequantize(tmp_path / f"{size}.gguf", tmp_path / out)) < 4 << 20
