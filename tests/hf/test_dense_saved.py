"""Models whose linear layers are packed, written and opened again."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import tiny_models
import torch
from packed_models import assert_same_bytes, logits
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import coterie
from coterie.errors import ArgumentError, CheckpointError
from coterie.hf.dense import PackedLinear, packed_linears
from coterie.hf.weight import PackedWeight

FAMILIES = ["qwen2_moe", "qwen3_next", "deepseek_v3", "mixtral", "gpt_oss", "hunyuan_v1_moe"]


def assert_same_linears(one, other) -> None:
    pairs = zip(packed_linears(one), packed_linears(other), strict=True)
    assert all(a == b and torch.equal(x.packed, y.packed) and x.spec == y.spec for (a, x), (b, y) in pairs)


@pytest.fixture
def packed(checkpoint, tmp_path):
    """A packed qwen3_moe checkpoint: experts in int8, linear layers in int4."""
    coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8", dense="int4").save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("family", FAMILIES)
def test_written_and_read(family, checkpoint, tmp_path):
    """Shared experts, latent and linear attention, names that are not the model's, biases."""
    model = coterie.from_pretrained(checkpoint(family), experts="int4", dense="int8", dense_skip=["o_proj"])
    count = len(list(packed_linears(model)))
    assert count > 5
    model.save_pretrained(tmp_path / "packed")
    for mmap in (False, True):
        again = coterie.from_pretrained(tmp_path / "packed", mmap=mmap)
        assert torch.equal(logits(again), logits(model))
        assert_same_bytes(again, model)
        assert_same_linears(again, model)
        assert again.get_memory_footprint() == model.get_memory_footprint()
        assert not isinstance(again.model.layers[-1].self_attn.o_proj, PackedLinear)


@pytest.mark.parametrize("dense", ["bf16", "int8", "int4", "fp8_block", "fp8_channel", "mxfp4", "nvfp4", "iq4_nl"])
def test_formats_and_a_tied_head(dense, tmp_path):
    tiny_models.make("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path / "plain")
    model = coterie.from_pretrained(tmp_path / "plain", experts="int4", dense=dense)
    model.save_pretrained(tmp_path / "packed")
    again = coterie.from_pretrained(tmp_path / "packed", mmap=True)
    assert torch.equal(logits(again), logits(model))
    assert "lm_head" in dict(packed_linears(again)) and again.config.tie_word_embeddings
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    again.dequantize().save_pretrained(tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert plain.lm_head.weight is plain.get_input_embeddings().weight


def test_what_is_written(packed):
    assert set(os.listdir(packed)) == {
        "config.json",
        "generation_config.json",
        "coterie.safetensors.index.json",
        "model-00001-of-00001.safetensors",
        "experts-00000.safetensors",
        "experts-00001.safetensors",
        "linears-00000.safetensors",
    }
    stored = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert stored["dense"] == "int4" and "dense_skip" not in stored
    index = json.loads((packed / "coterie.safetensors.index.json").read_text())["weight_map"]
    assert index["model.layers.1.self_attn.q_proj.weight"] == "linears-00000.safetensors"
    assert index["model.layers.1.mlp.gate.weight"] == "model-00001-of-00001.safetensors"


@pytest.mark.parametrize("mmap", [False, True])
def test_onto_the_folder_it_came_from(packed, mmap):
    model = coterie.from_pretrained(packed, mmap=mmap)
    expected, files = logits(model), set(os.listdir(packed))
    model.save_pretrained(packed)
    assert torch.equal(logits(model), expected) and torch.equal(logits(coterie.from_pretrained(packed)), expected)
    assert set(os.listdir(packed)) == files


def test_over_a_checkpoint_with_packed_linear_layers(packed, checkpoint):
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8")
    model.save_pretrained(packed)
    assert not (packed / "linears-00000.safetensors").exists()
    assert torch.equal(logits(coterie.from_pretrained(packed)), logits(model))


def test_by_transformers(packed):
    model = AutoModelForCausalLM.from_pretrained(packed)
    assert torch.equal(logits(model), logits(coterie.from_pretrained(packed)))
    longhand = AutoModelForCausalLM.from_pretrained(packed, quantization_config=coterie.CoterieConfig(mmap=True))
    assert torch.equal(logits(longhand), logits(model))


def test_a_class_with_another_head(packed):
    model = coterie.from_pretrained(packed, num_labels=3, auto_class=AutoModelForSequenceClassification)
    assert len(list(packed_linears(model))) == 8 and not isinstance(model.score, PackedLinear)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
def test_the_memory_that_is_asked_for(tied, mmap, tmp_path, monkeypatch):
    """That of the model, up to the ends of pages; of a mapped one, that of what is not packed."""
    tiny_models.make("qwen3_moe", tie_word_embeddings=tied).save_pretrained(tmp_path / "plain")
    coterie.from_pretrained(tmp_path / "plain", dense="int8").save_pretrained(tmp_path / "packed")
    asked = []
    monkeypatch.setattr("coterie.memory.require", lambda needed, what: asked.append(needed))
    model = coterie.from_pretrained(tmp_path / "packed", mmap=mmap)
    if mmap:
        expected = sum(p.nbytes for p in model.parameters() if not isinstance(p, PackedWeight))
        assert asked[0] == expected
    else:
        expected = model.get_memory_footprint(return_buffers=False)
        assert expected <= asked[0] < expected + 4096 * len(list(packed_linears(model)))


# --- what is asked of a packed checkpoint ---


@pytest.mark.parametrize("longhand", [True, False])
def test_another_format_than_packed_is_refused(packed, longhand):
    with pytest.raises(ArgumentError, match="dense='int8', but the checkpoint is already packed with dense='int4'"):
        if longhand:
            AutoModelForCausalLM.from_pretrained(packed, quantization_config=coterie.CoterieConfig(dense="int8"))
        coterie.from_pretrained(packed, dense="int8")
    with pytest.raises(ArgumentError, match=r"dense_skip=.*already packed"):
        coterie.from_pretrained(packed, dense="int4", dense_skip=["o_proj"])
    assert_same_linears(coterie.from_pretrained(packed, dense="int4"), coterie.from_pretrained(packed))


@pytest.mark.parametrize("longhand", [True, False])
def test_plain_linear_layers_of_a_packed_checkpoint_are_packed(checkpoint, tmp_path, longhand):
    coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8").save_pretrained(tmp_path)
    if longhand:
        options = coterie.CoterieConfig(dense="int4", dense_skip=["lm_head"])
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=options)
    else:
        model = coterie.from_pretrained(tmp_path, dense="int4", dense_skip=["lm_head"])
    expected = coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8", dense="int4", dense_skip=["lm_head"])
    assert_same_linears(model, expected)
    assert model.config.quantization_config.to_dict()["dense_skip"] == ["lm_head"]


# --- folders that are not what they say ---


def test_linear_layers_of_another_model(packed, tmp_path):
    tiny_models.make("qwen3_moe", num_key_value_heads=4).save_pretrained(tmp_path / "plain")
    other = coterie.from_pretrained(tmp_path / "plain", experts="int8", dense="int4")
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "linears-00000.safetensors", packed)
    with pytest.raises(CheckpointError, match=r"linears-00000.*k_proj.weight': packed from \[64, 64\], expected \[32"):
        coterie.from_pretrained(packed)


@pytest.mark.parametrize("dense", [None, "int8"])
def test_a_config_that_says_something_else(packed, dense):
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["dense"] = dense
    (packed / "config.json").write_text(json.dumps(config))
    said = "int8" if dense else "that no linear layers are packed"
    with pytest.raises(CheckpointError, match=f"packed as int4 in groups of 32, config.json says {said}"):
        coterie.from_pretrained(packed)


def test_a_file_that_is_missing(packed):
    (packed / "linears-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"linears-00000\.safetensors"):
        coterie.from_pretrained(packed)


def test_adapters_are_saved_alone(packed, tmp_path):
    peft = pytest.importorskip("peft")
    model = coterie.from_pretrained(packed)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    assert isinstance(adapted.get_base_model().model.layers[0].self_attn.q_proj.base_layer, PackedLinear)
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(coterie.from_pretrained(packed), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(adapted))
