"""from_pretrained and save_pretrained: every way in and out; test_hf_loading_errors.py has those that go wrong."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import tiny_models
import torch
from packed_models import assert_same_bytes, logits
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import coterie
from coterie.checkpoints.folder import PACKED_INDEX, SINGLE
from coterie.checkpoints.packed import UNFINISHED
from coterie.convert import convert_cpu
from coterie.errors import ArgumentError
from coterie.hf.quantizer import CoterieQuantizer


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "deepseek_v3", "ernie4_5_moe"])
@pytest.mark.parametrize(("experts", "options"), [("bf16", {}), ("int8", {}), ("int4", {"zero_point": True})])
def test_save_and_load_are_bit_equal(family, experts, options, checkpoint, tmp_path):
    model = coterie.from_pretrained(checkpoint(family), experts=experts, **options)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    names = set(os.listdir(tmp_path))
    assert PACKED_INDEX in names and not names & {SINGLE, "model.safetensors.index.json", UNFINISHED}
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
    weight_map = json.loads((packed / PACKED_INDEX).read_text())["weight_map"]
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
