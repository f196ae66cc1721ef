"""from_pretrained: every way in which it can go wrong."""

from __future__ import annotations

import json
import os

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import coterie
from coterie.checkpoints.folder import PACKED_INDEX, SINGLE
from coterie.checkpoints.packed import UNFINISHED
from coterie.errors import ArgumentError, CheckpointError, MissingTensorError, UnsupportedModelError


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"is empty: expected config\.json"):
        coterie.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "name", ["{}/nothing", "./nothing", "~/nothing", "some/where/nothing", "nothing/", "models/qwen"], ids=str
)
def test_no_such_folder(name, tmp_path, monkeypatch):
    """What looks like a path is not looked for on the hub; nor is a name in a folder that is here."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "qwen3").mkdir(parents=True)
    monkeypatch.setattr("coterie.hf.loading.AutoConfig", None)
    hint = r".*did you mean models/qwen3\?" if "qwen" in name else ""
    with pytest.raises(CheckpointError, match="is not a checkpoint folder: it does not exist" + hint):
        coterie.from_pretrained(name.format(tmp_path))


@pytest.mark.parametrize("name", ["gpt2", "someone/some-model"])
def test_hub_ids_are_asked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"couldn't connect|Can't load|offline|cached"):
        coterie.from_pretrained(name, cache_dir=tmp_path)


def test_adapter_in_the_place_of_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/some-model"}))
    with pytest.raises(CheckpointError, match=r"holds an adapter.*from_pretrained\('someone/some-model'\).*PeftModel"):
        coterie.from_pretrained(tmp_path)


def test_packed_without_its_index(packed):
    (packed / PACKED_INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"is packed but has no {PACKED_INDEX}"):
        coterie.from_pretrained(packed)


def test_no_config(plain):
    (plain / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        coterie.from_pretrained(plain)


def test_broken_config(plain):
    (plain / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        coterie.from_pretrained(plain)


def test_no_weights(plain):
    (plain / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        coterie.from_pretrained(plain)


def test_truncated_weights(plain):
    with open(plain / SINGLE, "r+b") as file:
        file.truncate(os.path.getsize(plain / SINGLE) - 100)
    with pytest.raises(CheckpointError, match="truncated"):
        coterie.from_pretrained(plain)
    with pytest.raises(CheckpointError, match="truncated"):
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=coterie.CoterieConfig())


def test_missing_shard(plain, tmp_path):
    AutoModelForCausalLM.from_pretrained(plain).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shard = sorted((tmp_path / "sharded").glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"missing: '{shard.name}'"):
        coterie.from_pretrained(tmp_path / "sharded")


def test_dense_model(tmp_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no experts"):
        coterie.from_pretrained(tmp_path)


def test_experts_outside_the_interface(tmp_path):
    config = AutoConfig.for_model("jetmoe", hidden_size=32, intermediate_size=64, num_hidden_layers=1, vocab_size=32)
    config.num_key_value_heads, config.kv_channels, config.num_local_experts = 2, 8, 4
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="JetMoeForCausalLM is not supported: its JetMoe"):
        coterie.from_pretrained(tmp_path)


def test_unsupported_activation(plain):
    edit_json(plain / "config.json", hidden_act="tanh")
    with pytest.raises(
        UnsupportedModelError, match="Qwen3MoeForCausalLM: Qwen3MoeExperts is not supported: its _apply_gate"
    ):
        coterie.from_pretrained(plain)


@pytest.mark.parametrize(
    ("count", "message"), [(7, "8 experts .* config.json says 7"), (9, "8 experts .* says 9: expert 8")]
)
def test_expert_count(plain, count, message):
    edit_json(plain / "config.json", num_local_experts=count)
    with pytest.raises(CheckpointError, match=message):
        coterie.from_pretrained(plain)


def edit_tensors(plain, change) -> None:
    tensors = load_file(plain / SINGLE)
    change(tensors)
    save_file(tensors, plain / SINGLE, metadata={"format": "pt"})


def test_missing_expert(plain):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_tensors(plain, lambda tensors: tensors.pop(name))
    with pytest.raises(
        CheckpointError, match=r"7 experts for model.layers.1.mlp.experts.gate_up_proj.*expert 3 is missing"
    ):
        coterie.from_pretrained(plain)


def test_missing_projection(plain):
    edit_tensors(plain, lambda t: [t.pop(name) for name in list(t) if "experts" in name and "up_proj" in name])
    with pytest.raises(MissingTensorError, match=r"no tensors mlp.experts.*.up_proj.weight"):
        coterie.from_pretrained(plain)


def test_missing_layer(plain):
    edit_tensors(plain, lambda t: [t.pop(name) for name in list(t) if "layers.1.mlp.experts" in name])
    with pytest.raises(MissingTensorError, match=r"names tried: .*mlp.experts.\*.gate_proj.weight"):
        coterie.from_pretrained(plain)


def test_wrong_shape(plain):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    edit_tensors(plain, lambda tensors: tensors.update({name: torch.zeros(95, 64, dtype=torch.bfloat16)}))
    with pytest.raises(CheckpointError, match=rf"tensor {name}: shape \[95, 64\], expected \[96, 64\]"):
        coterie.from_pretrained(plain)


def test_wrong_dtype(plain):
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    edit_tensors(plain, lambda tensors: tensors.update({name: torch.zeros(64, 96, dtype=torch.int8)}))
    with pytest.raises(CheckpointError, match=f"tensor {name}: dtype I8, expected one of BF16, F16, F32"):
        coterie.from_pretrained(plain)


def test_not_finite(plain):
    name = "model.layers.0.mlp.experts.5.down_proj.weight"
    edit_tensors(plain, lambda tensors: tensors[name].view(-1)[7:8].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"layers.0.mlp.experts.down_proj: down of expert 5: NaN"):
        coterie.from_pretrained(plain)


def test_stacked_count(tmp_path):
    tiny_models.make("granitemoe").save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", num_local_experts=6)
    with pytest.raises(CheckpointError, match=r"8 experts, config.json says 6"):
        coterie.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": "int3"}, "unknown format 'int3'"),
        ({"group_size": 48}, "group_size"),
        ({"experts": "int8", "zero_point": True}, "zero_point is an option of int4"),
        ({"experts": "int4", "group_size": 64}, "96 columns are not a multiple of group_size=64"),
        ({"mmap": True}, "packed checkpoint"),
        ({"quantization_config": None}, "experts="),
    ],
)
def test_options(options, message, checkpoint):
    with pytest.raises(ArgumentError, match=message):
        coterie.from_pretrained(checkpoint("qwen3_moe"), **options)


def test_config_options():
    with pytest.raises(ArgumentError, match=r"no option 'groupsize'.* did you mean group_size"):
        coterie.CoterieConfig(groupsize=32)
    config = coterie.CoterieConfig("int4", zero_point=True, mmap=True)
    assert coterie.CoterieConfig.from_dict(config.to_dict()).spec == config.spec
    with pytest.raises(CheckpointError, match=r"version '3\.0'"):
        coterie.CoterieConfig(version="3.0")


# --- a broken packed checkpoint ---


def test_packed_already(packed):
    with pytest.raises(ArgumentError, match="already packed with experts='int8'"):
        coterie.from_pretrained(packed, experts="int4")
    assert coterie.from_pretrained(packed, experts="int8") is not None


def test_packed_layer_missing(packed):
    (packed / "experts-00001.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"experts-00001.safetensors is missing"):
        AutoModelForCausalLM.from_pretrained(packed)


def test_packed_layer_truncated(packed):
    file = packed / "experts-00001.safetensors"
    with open(file, "r+b") as raw:
        raw.truncate(file.stat().st_size - 64)
    with pytest.raises(CheckpointError, match=r"experts-00001.safetensors is truncated"):
        AutoModelForCausalLM.from_pretrained(packed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_local_experts": 4}, "num_experts is 8, config.json says 4"),
        ({"moe_intermediate_size": 64}, "intermediate_size is 96, config.json says 64"),
        ({"hidden_act": "gelu"}, "activation is .*silu.* config.json says .*gelu"),
    ],
)
def test_packed_and_config_disagree(packed, change, message):
    edit_json(packed / "config.json", **change)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(packed)


def test_packed_format_disagrees(packed):
    config = json.loads((packed / "config.json").read_text())
    edit_json(packed / "config.json", quantization_config={**config["quantization_config"], "experts": "bf16"})
    with pytest.raises(CheckpointError, match=r"packed as .*int8.*, config.json says .*bf16"):
        coterie.from_pretrained(packed)


def test_unfinished(packed):
    (packed / UNFINISHED).write_text("{}")
    with pytest.raises(CheckpointError, match="was not finished"):
        AutoModelForCausalLM.from_pretrained(packed)
