"""Adapters merged into packed checkpoints whose linear layers are packed too."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

import coterie
from coterie.adapters.export import export_adapter
from coterie.adapters.merge import merge_adapter
from coterie.cli import app
from coterie.hf.converting import convert
from coterie.hf.dense import packed_linears

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_as_from_the_plain_base(tmp_path: Path) -> dict[str, torch.Tensor]:
    """bf16 loses nothing: a base with all of it packed gives the checkpoint that the plain one does, bit for bit."""
    convert(tmp_path / "base", tmp_path / "packed", quant_method="bf16", dense="bf16")
    for base in ("base", "packed"):
        merge_adapter(tmp_path / "adapter", tmp_path / f"from {base}", str(tmp_path / base))
    expected, found = tensors(tmp_path / "from base"), tensors(tmp_path / "from packed")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    configs = [json.loads((tmp_path / f"from {base}" / "config.json").read_text()) for base in ("base", "packed")]
    assert configs[0] == configs[1]
    return found


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_next", "deepseek_v3", "mixtral", "gpt_oss", "minimax_m2"])
def test_families(family, adapt, tmp_path):
    tiny_models.make(family).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapt(model, target_modules=["o_proj"], target_parameters=["experts.down_proj"])
    assert_as_from_the_plain_base(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=str,
)
def test_tied_heads(changes, adapt, tmp_path):
    tiny_models.make("qwen3_moe", tie_word_embeddings=True, num_hidden_layers=1).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapt(model, **{"target_modules": ["q_proj"], **changes})
    untied = "lm_head.weight" in assert_as_from_the_plain_base(tmp_path)
    assert untied == bool(changes)
    merge_adapter(tmp_path / "adapter", tmp_path / "again", str(tmp_path / "packed"), "int8")
    merged = coterie.from_pretrained(tmp_path / "again")
    table = tensors(tmp_path / "from base")["lm_head.weight" if untied else "model.embed_tokens.weight"]
    assert torch.equal(dict(packed_linears(merged))["lm_head"].dequantize(), table.float())


def test_packed_again(adapt, tmp_path):
    """Dequantised, added, and packed as before; what was left out stays so."""
    tiny_models.make("qwen2_moe").save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "packed", quant_method="int8", dense="int4", dense_skip="k_proj")
    model = coterie.from_pretrained(tmp_path / "packed")
    dense = {name: linear.dequantize() for name, linear in packed_linears(model)}
    adapted = adapt(model, target_modules=["q_proj", "k_proj", "lm_head"], target_parameters=EXPERTS)
    assert isinstance(adapted, PeftModel)
    done = merge_adapter(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "packed"), "int8")
    assert done.linears == "int4" and 0 < done.linear_error < 0.2
    merged = coterie.from_pretrained(tmp_path / "merged")
    found = dict(packed_linears(merged))
    assert found.keys() == dense.keys() and not any("k_proj" in name for name in found)
    for name, linear in found.items():
        expected = dense[name]
        module = adapted.get_base_model().get_submodule(name)
        if hasattr(module, "lora_A"):
            expected = expected + 2 * module.lora_B.default.weight @ module.lora_A.default.weight  # lora_alpha 8 / r 4
        assert torch.equal(linear.packed, coterie.Linear.pack(expected.bfloat16(), format="int4").packed), name
    stored = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]
    assert (stored["dense"], stored["dense_skip"]) == ("int4", ["k_proj"])


def test_classifiers(adapt, tmp_path):
    """Whose head was not in the base."""
    tiny_models.make("qwen3_moe", num_hidden_layers=1, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "packed", dense="int8")
    auto = AutoModelForSequenceClassification
    model = coterie.from_pretrained(tmp_path / "packed", num_labels=3, auto_class=auto)
    adapted = adapt(model, target_parameters=EXPERTS, target_modules=["q_proj"], task_type="SEQ_CLS")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "packed"), "int8")
    merged = coterie.from_pretrained(tmp_path / "merged", auto_class=auto)
    assert {name for name, _ in packed_linears(merged)} == {f"model.layers.0.self_attn.{p}_proj" for p in "qkvo"}
    with torch.no_grad():
        found, expected = merged(tiny_models.prompt()).logits, adapted(tiny_models.prompt()).logits
    assert ((found - expected).norm() / expected.norm()).item() < 0.1


def test_the_commands(adapt, tmp_path):
    tiny_models.make("qwen2_moe").save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "packed", dense="int8")
    adapt(coterie.from_pretrained(tmp_path / "packed"), target_modules=["q_proj"], target_parameters=EXPERTS)
    command = ["adapter", "merge", "-a", str(tmp_path / "adapter"), "-m", str(tmp_path / "packed"), "-o"]
    ran = CliRunner().invoke(app, [*command, str(tmp_path / "merged"), "--experts", "int4"])
    assert ran.exit_code == 0 and "linear layers in int8" in " ".join(ran.output.split()), ran.output
    for base in ("base", "packed"):
        export_adapter(tmp_path / "adapter", tmp_path / f"export {base}", str(tmp_path / base))
    one, other = tensors(tmp_path / "export base"), tensors(tmp_path / "export packed")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
