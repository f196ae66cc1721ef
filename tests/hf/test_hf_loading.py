"""from_pretrained and save_pretrained: every way in and out, and every way it can go wrong."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import tiny_models
import torch
from packed_models import assert_same_bytes, logits
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import coterie
from coterie.convert import convert_cpu
from coterie.errors import ArgumentError, CheckpointError, MissingTensorError, UnsupportedModelError
from coterie.hf.quantizer import CoterieQuantizer

SINGLE, INDEX = "model.safetensors", "coterie.safetensors.index.json"
UNFINISHED = "coterie-unfinished.json"


def edit_json(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- what works ---


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "ernie4_5_moe"])
@pytest.mark.parametrize(("experts", "options"), [("bf16", {}), ("int8", {}), ("int4", {"zero_point": True})])
def test_save_and_load_are_bit_equal(family, experts, options, checkpoint, tmp_path):
    model = coterie.from_pretrained(checkpoint(family), experts=experts, **options)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    names = set(os.listdir(tmp_path))
    assert INDEX in names and not names & {SINGLE, "model.safetensors.index.json", UNFINISHED}
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["experts"]) == ("coterie", experts)
    for again in (
        coterie.from_pretrained(tmp_path),
        coterie.from_pretrained(tmp_path, mmap=True),
        AutoModelForCausalLM.from_pretrained(tmp_path),
    ):
        assert type(again).__name__ == type(model).__name__
        assert torch.equal(logits(again), expected)
        assert_same_bytes(again, model)


def test_longhand(checkpoint):
    config = coterie.CoterieConfig(experts="int4", group_size=64, scale_search=False)
    with pytest.raises(ArgumentError, match="96 columns"):
        AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"), quantization_config=config)
    config = coterie.CoterieConfig(experts="int8", scale_search=False)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"), quantization_config=config)
    assert torch.equal(logits(model), logits(coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8")))
    assert isinstance(model.hf_quantizer, CoterieQuantizer)
    assert model.config._experts_implementation == "coterie"
    assert model.hf_quantizer.is_trainable and model.hf_quantizer.is_serializable()


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3"])
@pytest.mark.parametrize("experts", ["int8", "int4"])
def test_converted_checkpoint_is_the_same(family, experts, checkpoint, tmp_path):
    convert_cpu(checkpoint(family), tmp_path / "converted", experts)
    converted = coterie.from_pretrained(tmp_path / "converted")
    direct = coterie.from_pretrained(checkpoint(family), experts=experts)
    assert_same_bytes(converted, direct)
    assert torch.equal(logits(converted), logits(direct))
    converted.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(direct))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_source_dtypes(dtype, tmp_path):
    model = tiny_models.make("qwen3_moe", dtype)
    model.save_pretrained(tmp_path)
    loaded = coterie.from_pretrained(tmp_path, experts="int8")
    assert loaded.dtype == dtype
    weights = model.model.layers[0].mlp.experts.down_proj[1]
    expected = coterie.Experts.empty(1, 64, 96, format="int8")
    expected.pack_projection("down", 0, weights.detach())
    found = loaded.model.layers[0].mlp.experts.packed_module.experts
    # Packed from the checkpoint's own dtype, whatever dtype the rest is loaded in.
    assert torch.equal(found.dequantize_projection("down", 1), expected.dequantize_projection("down", 0))
    cast = coterie.from_pretrained(tmp_path, experts="int8", dtype=torch.bfloat16)
    assert cast.dtype == torch.bfloat16
    assert_same_bytes(cast, loaded)


def test_shards(plain, checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(plain)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    loaded = coterie.from_pretrained(tmp_path / "sharded", experts="int4")
    assert_same_bytes(loaded, coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int4"))
    loaded.save_pretrained(tmp_path / "packed", max_shard_size="20KB")
    assert len(list((tmp_path / "packed").glob("model-*.safetensors"))) > 3
    assert torch.equal(logits(coterie.from_pretrained(tmp_path / "packed")), logits(loaded))


def test_checkpoint_of_the_model_without_its_head(plain, checkpoint):
    """Its names lack the prefix that the model's have."""
    tensors = load_file(plain / SINGLE)
    save_file({name.removeprefix("model."): t for name, t in tensors.items()}, plain / SINGLE, {"format": "pt"})
    loaded = coterie.from_pretrained(plain, experts="int4")
    assert_same_bytes(loaded, coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int4"))


def test_stacked_checkpoint(checkpoint, tmp_path):
    """A checkpoint in the model's own layout, gate_up_proj [E, 2I, H], is read expert by expert too."""
    model = tiny_models.make("qwen3_moe")
    model.save_pretrained(tmp_path, save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / SINGLE)
    assert_same_bytes(
        coterie.from_pretrained(tmp_path, experts="int4"),
        coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int4"),
    )


def test_converters_that_only_transformers_knows(checkpoint, tmp_path):
    """qwen3_vl_moe's converter transposes stacked experts; such a layer is made by Transformers, then packed."""
    from transformers.core_model_loading import Transpose, WeightConverter

    model = tiny_models.make("qwen3_moe")
    model.save_pretrained(tmp_path, save_original_format=False)
    tensors = load_file(tmp_path / SINGLE)
    tensors = {k: v.transpose(1, 2).contiguous() if ".experts." in k else v for k, v in tensors.items()}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    import transformers.conversion_mapping as mapping

    original = mapping.get_checkpoint_conversion_mapping
    converters = [
        WeightConverter(f"mlp.experts.{name}", f"mlp.experts.{name}", [Transpose(1, 2, check_dims=True)])
        for name in ("gate_up_proj", "down_proj")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mapping,
            "get_checkpoint_conversion_mapping",
            lambda kind: converters if kind == "qwen3_moe" else original(kind),
        )
        loaded = coterie.from_pretrained(tmp_path, experts="int4")
    assert_same_bytes(loaded, coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int4"))


def test_index_names_every_tensor(packed):
    """The experts' too, and they are opened once, by coterie."""
    weight_map = json.loads((packed / INDEX).read_text())["weight_map"]
    files = {file.name: set(load_file(file)) for file in packed.glob("*.safetensors")}
    assert weight_map == {name: file for file, names in files.items() for name in names}
    assert {"experts-00000.safetensors", "experts-00001.safetensors"} < set(files)
    _, report = AutoModelForCausalLM.from_pretrained(packed, output_loading_info=True)
    assert not any(report.values())


def test_nothing_reported_missing(checkpoint):
    config = coterie.CoterieConfig(experts="int8")
    _, report = AutoModelForCausalLM.from_pretrained(
        checkpoint("qwen3_moe"), quantization_config=config, output_loading_info=True
    )
    assert not any(report.values())


@pytest.fixture
def hub(packed, tmp_path, monkeypatch):
    """A hub cache without network that holds someone/some-model; (cache, snapshot)."""
    repository = tmp_path / "cache" / "models--someone--some-model"
    snapshot = shutil.copytree(packed, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "cache", snapshot


def test_hub_id_in_the_cache(hub, packed):
    expected = logits(coterie.from_pretrained(packed))
    for load in (coterie.from_pretrained, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load("someone/some-model", cache_dir=hub[0])), expected)
    found = coterie.from_pretrained("someone/some-model", cache_dir=hub[0], local_files_only=True, mmap=True)
    assert torch.equal(logits(found), expected)


def test_hub_id_whose_experts_were_not_downloaded(hub):
    (hub[1] / "experts-00001.safetensors").unlink()
    for load in (coterie.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(OSError, match=r"experts-00001.safetensors"):
            load("someone/some-model", cache_dir=hub[0])


def test_the_name_of_a_packed_model_is_what_it_was_loaded_by(hub, packed):
    """Adapters record it as their base: the hub id, not where the cache is."""
    model = coterie.from_pretrained("someone/some-model", cache_dir=hub[0])
    assert model.config.name_or_path == model.name_or_path == "someone/some-model"


def test_config_without_dtype(checkpoint, tmp_path):
    """Transformers asks the first shard for the dtype then, which is one of experts: bytes."""
    plain = shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "plain")
    config = json.loads((plain / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    (plain / "config.json").write_text(json.dumps(config))
    convert_cpu(plain, tmp_path / "converted", "int8")
    assert coterie.from_pretrained(tmp_path / "converted").dtype == torch.bfloat16


# --- what does not ---


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
    (packed / INDEX).unlink()
    with pytest.raises(CheckpointError, match=f"is packed but has no {INDEX}"):
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
