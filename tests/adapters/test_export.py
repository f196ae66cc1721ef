"""Exported adapters name the tensors of the checkpoint that they belong to."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from peft import PeftModel
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import coterie
from coterie.adapters.export import export_adapter
from coterie.adapters.merge import merge_adapter

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
UNGATED = ["experts.up_proj", "experts.down_proj"]
# Their checkpoints store a layer's experts as one tensor.
STACKED = ("gemma4_text", "gpt_oss", "granitemoe", "granitemoeshared", "granitemoehybrid")


def of_module(name: str, config: dict, pattern: str, default: str) -> float:
    """A module's rank or alpha, as PEFT finds it."""
    key = get_pattern_key(config[pattern], name)
    return config[pattern].get(key, config[default])


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_pair_is_of_a_tensor_of_the_checkpoint(family, adapt, tmp_path):
    """W + scaling * B A of every exported pair is the merged checkpoint's tensor of that name."""
    tiny_models.make(family, torch.float32).save_pretrained(tmp_path / "base")
    before = load_file(tmp_path / "base" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    ranks = {"experts.down_proj": 3, "layers.1.self_attn.o_proj": 2}
    gated = family != "nemotron_h"  # of whose linear layers PEFT refuses those that Mamba calls out_proj
    linears, experts = ("all-linear", EXPERTS) if gated else (["q_proj", "o_proj", "in_proj"], UNGATED)
    adapt(model, lora_alpha=8, target_modules=linears, target_parameters=experts, rank_pattern=ranks)
    done = export_adapter(tmp_path / "adapter", tmp_path / "exported")
    found = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    if family in STACKED:
        expected = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
        assert done.experts == 0 and found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
        return
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    config = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    modules = [key.removesuffix(".lora_A.weight") for key in found if key.endswith(".lora_A.weight")]
    assert len(found) == 2 * len(modules) and not config["target_parameters"]
    changed = {f"{module.removeprefix('base_model.model.')}.weight" for module in modules}
    assert changed == {key for key in before if not torch.equal(before[key], merged[key])}
    assert done.experts == 16 and sum(".experts." in key for key in changed) == 16 * (3 if gated else 2)
    for module in modules:
        name = module.removeprefix("base_model.model.")
        a, b = found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"]
        rank, alpha = (
            of_module(name, config, "rank_pattern", "r"),
            of_module(name, config, "alpha_pattern", "lora_alpha"),
        )
        assert a.shape[0] == b.shape[1] == rank
        assert name.rpartition(".")[2] in config["target_modules"]
        delta = merged[f"{name}.weight"] - before[f"{name}.weight"]
        assert torch.allclose(alpha / rank * (b @ a), delta, atol=1e-5), name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_exported_and_loaded_again(family, adapt, tmp_path):
    """PEFT turns LoRA of single experts back into that of stacked ones: of gate and up a higher rank, filled up with
    zeros, which change no sum."""
    tiny_models.make(family).save_pretrained(tmp_path / "base")
    model = adapt(coterie.from_pretrained(tmp_path / "base", experts="bf16"), target_parameters=EXPERTS)
    export_adapter(tmp_path / "adapter", tmp_path / "exported")
    again = PeftModel.from_pretrained(coterie.from_pretrained(tmp_path / "base", experts="bf16"), tmp_path / "exported")
    found, expected = again(tiny_models.prompt()).logits, model(tiny_models.prompt()).logits
    assert torch.equal(found, expected)
    with model.disable_adapter():
        base = model(tiny_models.prompt()).logits
    assert ((base - expected).norm() / expected.norm()).item() > 0.1
