"""What plan says of a model, against what the model really takes."""

from __future__ import annotations

import json

import pytest
import torch
from hf.tiny_models import FAMILIES, make

import coterie
from coterie import formats, plan, tiny
from coterie.errors import CheckpointError, UnsupportedModelError
from coterie.hf.modules import packed_modules


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_real_model(tmp_path, family):
    model = make(family)
    model.config.save_pretrained(tmp_path)
    anatomy = plan.inspect(tmp_path, context=20)
    assert anatomy.parameters == sum(p.numel() for p in model.parameters())
    with torch.inference_mode():
        cache = model(input_ids=torch.zeros(1, 20, dtype=torch.long), use_cache=True).past_key_values
    tensors = {id(t): t for layer in cache.layers for t in tensors_in(vars(layer))}
    assert anatomy.cache_nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert {layer.per_token for layer in anatomy.experts} == {2}


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


@pytest.mark.parametrize("format", formats.FORMATS)
def test_expert_bytes_are_those_of_the_packed_model(format):
    model = coterie.from_pretrained(tiny.PATH, experts=format)
    packed = sum(module.experts.nbytes for _, module in packed_modules(model))
    anatomy = plan.inspect(tiny.PATH)
    assert anatomy.experts_nbytes(formats.resolve(format)) == packed
    assert anatomy.experts_read_nbytes(formats.resolve(format)) == packed * 4 // 16


def test_stored_bytes_come_from_the_headers(tmp_path):
    assert plan.stored_nbytes(tiny.PATH) == {"BF16": 2 * plan.inspect(tiny.PATH).parameters}
    assert plan.stored_nbytes(tmp_path) == {}
    assert plan.stored_nbytes(tiny.PATH / "config.json") == {}


def test_placement():
    anatomy = plan.inspect(tiny.PATH)
    spec = formats.resolve("int4")
    rest = anatomy.rest_nbytes + anatomy.cache_nbytes
    experts = anatomy.experts_nbytes(spec)

    on_cpu = plan.estimate(anatomy, spec, ram=2 * 10**9, vram=0, bandwidth=1e9)
    assert (on_cpu.ram, on_cpu.vram, on_cpu.fits) == (experts + rest + plan.RESERVE, 0, True)
    with_gpu = plan.estimate(anatomy, spec, ram=plan.RESERVE, vram=rest, bandwidth=1e9)
    assert (with_gpu.ram, with_gpu.vram, with_gpu.ram_short) == (experts + plan.RESERVE, rest, experts)
    too_small = plan.estimate(anatomy, spec, ram=2 * 10**9, vram=rest - 1, bandwidth=1e9)
    assert too_small == on_cpu
    assert with_gpu.tokens_per_second == pytest.approx(1e9 / anatomy.experts_read_nbytes(spec))


def test_long_contexts_are_extrapolated_exactly_where_the_cache_grows_evenly():
    short, long = plan.inspect(tiny.PATH, 100), plan.inspect(tiny.PATH, 100_000)
    assert long.cache_nbytes == 1000 * short.cache_nbytes


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("not json", CheckpointError, "not valid JSON"),
        ("[]", CheckpointError, "expected an object"),
        ('{"model_type": "no_such_model"}', UnsupportedModelError, "no_such_model"),
        ("{}", UnsupportedModelError, "model_type is None"),
        ('{"model_type": "qwen3_moe", "hidden_size": "wide"}', CheckpointError, "qwen3_moe"),
    ],
)
def test_bad_configs(tmp_path, content, error, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=message):
        plan.inspect(tmp_path)


def test_a_dense_model_is_refused_by_name(tmp_path):
    dense = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    with pytest.raises(UnsupportedModelError, match="Qwen3ForCausalLM"):
        plan.inspect(tmp_path)
