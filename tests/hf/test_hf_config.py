"""The config of a model that is loaded: settings given to from_pretrained, and CoterieConfig in longhand."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from packed_models import logits
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

import coterie
from coterie.errors import ArgumentError, UnsupportedModelError
from coterie.hf.modules import packed_modules
from coterie.hf.quantizer import CoterieQuantizer

SETTINGS = [
    {"num_experts_per_tok": 1},
    {"output_router_logits": True},
    {"num_hidden_layers": 1},
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    {"attn_implementation": "eager"},
    {"dtype": torch.float32},
    {"dtype": "auto"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: next(iter(settings)))
def test_settings_as_transformers_takes_them(settings, checkpoint):
    longhand = AutoModelForCausalLM.from_pretrained(
        checkpoint("qwen3_moe"), quantization_config=coterie.CoterieConfig("bf16"), **settings
    )
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), experts="bf16", **settings)
    assert torch.equal(logits(model), logits(longhand)) and model.dtype == longhand.dtype
    assert model.config.to_dict() == longhand.config.to_dict()
    name, value = next(iter(settings.items()))
    if name not in ("dtype", "attn_implementation"):
        assert getattr(model.config, name) == value


def test_settings_of_a_packed_checkpoint(packed):
    model = coterie.from_pretrained(packed, num_experts_per_tok=1, output_router_logits=True)
    expected = AutoModelForCausalLM.from_pretrained(packed, num_experts_per_tok=1, output_router_logits=True)
    assert model.config.num_experts_per_tok == 1 and torch.equal(logits(model), logits(expected))


def test_another_head(checkpoint):
    model = coterie.from_pretrained(
        checkpoint("qwen3_moe"), experts="int8", num_labels=3, auto_class=AutoModelForSequenceClassification
    )
    assert model.score.out_features == model.config.num_labels == 3


def test_subfolder(packed, checkpoint, tmp_path):
    packed.rename(tmp_path / "packed-model")
    model = coterie.from_pretrained(tmp_path, subfolder="packed-model", mmap=True)
    assert torch.equal(logits(model), logits(coterie.from_pretrained(tmp_path / "packed-model")))
    assert next(packed_modules(model))[1] is not None


def test_unknown_settings_are_refused_as_by_transformers(checkpoint):
    with pytest.raises(TypeError, match="no_such_setting"):
        coterie.from_pretrained(checkpoint("qwen3_moe"), no_such_setting=1)


@pytest.mark.parametrize("kind", ["plain", "packed"])
def test_the_config_that_is_given_is_not_changed(kind, request):
    folder = request.getfixturevalue(kind)
    config = AutoConfig.from_pretrained(folder)
    before = copy.deepcopy(config.__dict__)
    model = coterie.from_pretrained(folder, config=config, **({"mmap": True} if kind == "packed" else {}))
    assert config.__dict__ == before
    assert not hasattr(model.config, "transformers_weights")


# --- CoterieConfig in longhand, for a packed checkpoint ---


def load(folder, *args, **options):
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=coterie.CoterieConfig(*args, **options))


@pytest.mark.parametrize("asked", [{}, {"experts": "int8"}])
def test_longhand_mmap(packed, asked, monkeypatch):
    opened = []
    monkeypatch.setattr("coterie.Experts.from_packed", lambda file, mmap: opened.append(mmap) or 1 / 0)
    for mmap in (True, False):
        with pytest.raises(ZeroDivisionError):
            load(packed, mmap=mmap, **asked)
    assert opened == [True, False]


@pytest.mark.parametrize("asked", [{"experts": "int4"}, {"experts": "int4", "zero_point": True}, {"group_size": 64}])
@pytest.mark.parametrize("longhand", [True, False])
def test_another_format_than_packed_is_refused(packed, asked, longhand):
    with pytest.raises(ArgumentError, match=r"is already packed with .*: leave it out"):
        load(packed, **asked) if longhand else coterie.from_pretrained(packed, **asked)


def test_mmap_of_a_plain_checkpoint_is_refused_in_longhand_too(plain):
    with pytest.raises(ArgumentError, match="mmap=True needs a packed checkpoint"):
        load(plain, mmap=True)


def test_what_is_stored_is_what_packed_experts_are():
    stored = coterie.CoterieConfig("int4", zero_point=True, mmap=True, scale_search=False).to_dict()
    assert stored.keys() == {"quant_method", "version", "experts", "group_size", "zero_point"}


# --- sharding by Transformers ---


@pytest.mark.parametrize("option", [{"ep_size": 2}, {"enable_expert_parallel": True}, {"tp_size": 2}])
@pytest.mark.parametrize("pre_quantized", [True, False])
def test_expert_and_tensor_parallelism_are_refused(option, pre_quantized):
    config = PretrainedConfig()
    config.distributed_config = SimpleNamespace(
        **{"ep_size": 1, "tp_size": 1, "enable_expert_parallel": False, **option}
    )
    quantizer = CoterieQuantizer(coterie.CoterieConfig(), pre_quantized=pre_quantized)
    with pytest.raises(UnsupportedModelError, match=next(iter(option))):
        quantizer.update_attn_implementation(config)


def test_expert_parallelism_is_refused_before_anything_is_loaded(plain, monkeypatch):
    distributed = pytest.importorskip("transformers.distributed")
    config = distributed.DistributedConfig(tp_size=1, fsdp_size=1, pp_size=1)
    config.ep_size, config.enable_expert_parallel = 2, True
    monkeypatch.setattr("coterie.hf.quantizer.read_layouts", lambda model: 1 / 0)
    with pytest.raises(UnsupportedModelError, match="packed experts are not sharded"):
        coterie.from_pretrained(plain, distributed_config=config)
