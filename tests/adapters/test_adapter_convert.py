"""Adapters in other layouts become what PEFT saves now; truths are made expert by expert."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import coterie
from coterie.adapters.convert import convert_adapter
from coterie.adapters.merge import merge_adapter
from coterie.errors import ArgumentError, CheckpointError

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
E, R = 8, 4


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def old_peft(a, b):
    """Input and output the other way round: A holds what B should, of each expert."""
    old_a, old_b = torch.empty(E * R, b.shape[0]), torch.empty(a.shape[1], R * E)
    for e in range(E):
        old_a[e * R : (e + 1) * R], old_b[:, e::E] = b[:, e::E].T, a[e * R : (e + 1) * R].T
    return old_a, old_b


def unsloth(a, b):
    """Columns of B by expert first."""
    return a, torch.cat([b[:, e::E] for e in range(E)], 1)


def rewrite(folder, change, version):
    """A saved adapter in another layout, with the tensors that it had."""
    stored = load_file(folder / "adapter_model.safetensors")
    other = dict(stored)
    for key in [key for key in stored if ".experts." in key and "lora_A" in key]:
        pair = key, key.replace("lora_A", "lora_B")
        other[pair[0]], other[pair[1]] = change(*(stored[name] for name in pair))
    save_file({key: t.contiguous() for key, t in other.items()}, folder / "adapter_model.safetensors")
    edit_config(folder, peft_version=version)
    return stored


@pytest.mark.parametrize(
    ("family", "written_by", "change", "version"),
    [
        ("qwen3_moe", "peft-0.19.0", old_peft, "0.19.0"),
        ("olmoe", "peft-0.19.0", old_peft, "0.18.1"),
        ("mixtral", "peft-0.19.0", old_peft, None),
        ("gpt_oss", "peft-0.19.0", old_peft, "0.19.0"),
        ("qwen3_moe", "unsloth", unsloth, "0.20.0"),
        ("gpt_oss", "unsloth", unsloth, "0.21.0"),
    ],
)
def test_becomes_what_peft_saves_now(family, written_by, change, version, adapt, tmp_path):
    tiny_models.make(family).save_pretrained(tmp_path / "base")
    model = coterie.from_pretrained(tmp_path / "base", experts="bf16")
    adapted = adapt(model, target_modules=["q_proj"], target_parameters=EXPERTS, lora_alpha=8)
    expected = adapted(tiny_models.prompt()).logits
    stored = rewrite(tmp_path / "adapter", change, version)
    done = convert_adapter(tmp_path / "adapter", tmp_path / "out", written_by)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert done.experts == 2 * E and done.tensors == len(found)
    assert found.keys() == stored.keys() and all(torch.equal(found[key], stored[key]) for key in found)
    again = PeftModel.from_pretrained(coterie.from_pretrained(tmp_path / "base", experts="bf16"), tmp_path / "out")
    assert torch.equal(again(tiny_models.prompt()).logits, expected)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_kt(family, rslora, adapt, tmp_path):
    """The merged checkpoint has scaling * B A of each expert's matrix added."""
    tiny_models.make(family, torch.float32).save_pretrained(tmp_path / "base")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    hidden, inner = plain.config.hidden_size, 96
    adapt(plain, target_modules=["q_proj"], lora_alpha=8, use_rslora=rslora)
    edit_config(tmp_path / "adapter", target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    random, experts = torch.Generator().manual_seed(0), {}
    for layer in range(2):
        for part, into, out in (("gate", hidden, inner), ("up", hidden, inner), ("down", inner, hidden)):
            stem = f"layers.{layer}.experts.{part}_lora_"
            experts[f"{stem}a"] = torch.randn(E, R, into, generator=random)
            experts[f"{stem}b"] = torch.randn(E, out, R, generator=random)
    save_file(experts, tmp_path / "adapter" / "fused_expert_lora.safetensors")
    convert_adapter(tmp_path / "adapter", tmp_path / "out", "kt")
    merge_adapter(tmp_path / "out", tmp_path / "merged")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    stem, leaves = {
        "qwen3_moe": ("mlp.experts", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
        "mixtral": ("block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
    }[family]
    scaling = 8 / (R**0.5 if rslora else R)
    for layer in range(2):
        for e in range(E):
            for part, leaf in leaves.items():
                name = f"model.layers.{layer}.{stem}.{e}.{leaf}.weight"
                a, b = (experts[f"layers.{layer}.experts.{part}_lora_{x}"][e] for x in "ab")
                assert torch.allclose(after[name] - before[name], scaling * b @ a, atol=1e-4), name
    assert not torch.equal(
        after["model.layers.0.self_attn.q_proj.weight"], before["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize(
    ("family", "written_by", "version", "message"),
    [
        ("qwen3_moe", "peft-0.19.0", "0.19.1", r"saved by PEFT 0\.19\.1, which lays LoRA of experts out as it is now"),
        ("gpt_oss", "peft-0.19.0", "0.18.1", "has no LoRA of experts that .* in another way now: use it as it is"),
        ("qwen3_moe", "unsloth", "0.18.1", r"saved with PEFT 0\.18\.1: what Unsloth made"),
        ("qwen3_moe", "peft", None, "--from is 'peft': expected one of peft-0.19.0, unsloth, kt"),
        ("qwen3_moe", "kt", None, "has no fused_expert_lora.safetensors"),
    ],
)
def test_what_is_not_converted(family, written_by, version, message, adapt, tmp_path):
    tiny_models.make(family).save_pretrained(tmp_path / "base")
    adapt(coterie.from_pretrained(tmp_path / "base", experts="bf16"), target_parameters=EXPERTS)
    edit_config(tmp_path / "adapter", peft_version=version)
    with pytest.raises((ArgumentError, CheckpointError), match=message):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", written_by)
    assert not (tmp_path / "out").exists()


def test_attention_alone(adapt, tmp_path):
    tiny_models.make("qwen3_moe").save_pretrained(tmp_path / "base")
    adapt(coterie.from_pretrained(tmp_path / "base", experts="bf16"), target_modules=["q_proj"])
    edit_config(tmp_path / "adapter", peft_version="0.18.0")
    with pytest.raises(ArgumentError, match="has no LoRA of experts"):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", "peft-0.19.0")


def test_layers_that_the_model_has_not(adapt, tmp_path):
    tiny_models.make("qwen3_moe").save_pretrained(tmp_path / "base")
    adapt(coterie.from_pretrained(tmp_path / "base", experts="bf16"), target_modules=["q_proj"])
    save_file({"layers.7.experts.up_lora_a": torch.ones(1)}, tmp_path / "adapter" / "fused_expert_lora.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.7\.experts\.up_lora_a: expected .* N one of \[0, 1\]"):
        convert_adapter(tmp_path / "adapter", tmp_path / "out", "kt")
