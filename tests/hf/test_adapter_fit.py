"""Adapters of other versions of PEFT, and of experts that a model does not have: refused wherever they are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from lora_models import adapt, packed
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from coterie.adapters.export import export_adapter
from coterie.adapters.merge import merge_adapter
from coterie.errors import ArgumentError


def saved(folder: Path, base: Path, version: str | None, swapped: bool = False) -> Path:
    """An adapter on `base` that says it was saved by that PEFT; swapped: with A and B as PEFT 0.19.0 saved them."""
    adapt(packed(base), task_type="CAUSAL_LM").save_pretrained(folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["peft_version"] = version
    (folder / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if swapped:
        stored = load_file(folder / "adapter_model.safetensors")
        for key in [key for key in stored if "lora_A" in key]:
            other = key.replace("lora_A", "lora_B")
            stored[key], stored[other] = stored[other].T.contiguous(), stored[key].T.contiguous()
        save_file(stored, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def commands(adapter: Path, base: Path, output: Path) -> list:
    return [
        lambda: PeftModel.from_pretrained(packed(base), adapter),
        lambda: merge_adapter(adapter, output),
        lambda: export_adapter(adapter, output),
    ]


@pytest.mark.parametrize(
    ("family", "version"),
    [
        ("qwen3_moe", "0.18.1"),
        ("qwen3_moe", "0.19.0"),
        ("qwen3_moe", "0.18.2.dev0@abcdef"),
        ("gpt_oss", "0.19.0"),  # alone had those that are stored [E, in, out] so
    ],
)
def test_peft_that_had_input_and_output_the_other_way_round(family, version, checkpoint, tmp_path):
    adapter = saved(tmp_path / "adapter", checkpoint(family), version, swapped=True)
    for command in commands(adapter, checkpoint(family), tmp_path / "out"):
        with pytest.raises(ArgumentError, match=rf"saved by PEFT {version}.*the other way round.*0\.19\.1"):
            command()
    assert not (tmp_path / "out").exists()


def test_where_the_version_is_not_known_shapes_tell(checkpoint, tmp_path):
    adapter = saved(tmp_path / "adapter", checkpoint("qwen3_moe"), None, swapped=True)
    for command in commands(adapter, checkpoint("qwen3_moe"), tmp_path / "out"):
        with pytest.raises(ArgumentError, match="input and output are the other way round"):
            command()


def test_where_shapes_do_not_tell_it_warns(checkpoint, tmp_path, caplog):
    adapter = saved(tmp_path / "adapter", checkpoint("qwen3_moe"), None)
    PeftModel.from_pretrained(packed(checkpoint("qwen3_moe")), adapter)
    assert "does not say which PEFT saved it" in caplog.text


@pytest.mark.parametrize(("family", "version"), [("gpt_oss", "0.18.1"), ("qwen3_moe", "0.19.1")])
def test_what_has_always_been_so_is_read(family, version, checkpoint, tmp_path, caplog):
    adapter = saved(tmp_path / "adapter", checkpoint(family), version)
    for command in commands(adapter, checkpoint(family), tmp_path / "out")[:2]:
        command()
    assert not caplog.text


@pytest.mark.parametrize("known", [True, False])
def test_lora_of_single_experts_that_nothing_takes(known, checkpoint, tmp_path):
    """Transformers 4 saved such adapters; PEFT turns those of some families into LoRA of stacked experts."""
    leaf = "down_proj" if known else "w9"
    stored = {
        f"base_model.model.model.layers.{layer}.mlp.experts.{e}.{leaf}.lora_{x}.weight": torch.randn(*shape)
        for layer in range(2)
        for e in range(8)
        for x, shape in (("A", (4, 96)), ("B", (64, 4)))
    }
    base = checkpoint("qwen2_moe")
    config = LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM", base_model_name_or_path=str(base))
    config.save_pretrained(tmp_path / "adapter")
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    for command in commands(tmp_path / "adapter", base, tmp_path / "out"):
        with pytest.raises(ArgumentError, match=r"does not fit .*have no place in it"):
            command()
    assert not (tmp_path / "out").exists()
