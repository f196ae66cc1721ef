"""Linear attention by the engine, of prompts and of decoded tokens, beside the modules' own code."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_step import assert_same, by_own_code, decode
from tiny_models import make
from transformers import DynamicCache

import coterie
from coterie import _native
from coterie.hf.inference.delta import QuickDelta

FAMILIES = ["qwen3_next", "qwen3_5_moe_text"]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """opened(family, dtype): a tiny model of it, the same for every test."""
    kept = {}

    def open_one(family, dtype=torch.float32):
        if (family, dtype) not in kept:
            folder = tmp_path_factory.mktemp(family)
            make(family, linear_num_key_heads=2, linear_num_value_heads=6).save_pretrained(folder)
            kept[family, dtype] = coterie.from_pretrained(folder, experts="bf16", dense="bf16", dtype=dtype)
        return kept[family, dtype]

    return open_one


def linear(model) -> list[QuickDelta]:
    return [module for module in model.modules() if isinstance(module, QuickDelta)]


def counted(monkeypatch) -> list:
    """The tokens of each call of the engine, of a module or of a layer."""
    calls = []
    for name in ("delta_rule", "delta_step"):
        call = getattr(_native, name)
        monkeypatch.setattr(_native, name, lambda *given, call=call: calls.append(given[0].shape[1]) or call(*given))
    return calls


class Own:
    """The modules' own code, while inside."""

    def __init__(self, model):
        self.modules = linear(model)

    def __enter__(self):
        for module in self.modules:
            module.is_quick = False

    def __exit__(self, *_):
        for module in self.modules:
            module.is_quick = None


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [1, 3])
def test_families(family, dtype, sequences, opened, float32_products, monkeypatch):
    model, calls = opened(family, dtype), counted(monkeypatch)
    found = decode(model, sequences)
    assert len(linear(model)) == 1 and linear(model)[0].is_quick and len(calls) >= 5
    with Own(model):
        expected = decode(model, sequences)
    if dtype == torch.float32:
        assert_same(found, expected)
    else:  # a rounding may choose another expert
        exact = decode(opened(family), sequences)
        found, expected = ((logits.float() - exact).norm() / exact.norm() for logits in (found, expected))
        assert found < 1.25 * expected < 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_long_answers_and_caches_that_change(family, opened, float32_products):
    model = opened(family)
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(ids, do_sample=False, **options), model.generate(ids, num_beams=3, **options)
    with Own(model):
        expected = model.generate(ids, do_sample=False, **options), model.generate(ids, num_beams=3, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_padded_sequences(opened, float32_products, monkeypatch):
    model, mask, calls = opened("qwen3_next"), torch.ones(3, 12, dtype=torch.int64), counted(monkeypatch)
    mask[1, :4] = 0
    found = decode(model, 3, mask)
    assert 12 in calls and calls[-1] == 1
    with Own(model), by_own_code(model):
        assert_same(found, decode(model, 3, mask))


def test_another_rule_is_left_alone(opened, float32_products, monkeypatch):
    """It has all the parts, and another norm."""
    model, calls = copy.deepcopy(opened("qwen3_next")), counted(monkeypatch)
    (module,) = linear(model)
    own = type(module.norm).forward
    monkeypatch.setattr(type(module.norm), "forward", lambda self, *given: 2 * own(self, *given))
    found = decode(model)
    assert module.is_quick is False and len(calls) == 1
    assert torch.equal(decode(model), found)


def test_hooks_are_heard_and_parts_that_change_are_tried_anew(opened, float32_products):
    model = copy.deepcopy(opened("qwen3_next"))
    (module,) = linear(model)
    plain, seen = decode(model), []
    for part in (module.norm, module.conv1d):
        hook = part.register_forward_hook(lambda *_: seen.append(1))
        assert_same(decode(model), plain)
        hook.remove()
    assert len(seen) > 4
    module.norm = copy.deepcopy(module.norm)
    module.norm.weight.data *= 2
    found = decode(model)
    assert module.proved_parts[1] is module.norm and not torch.allclose(found, plain)
    with Own(model):
        assert_same(found, decode(model))


def test_another_default_dtype(opened, monkeypatch):
    model = copy.deepcopy(opened("qwen3_next"))
    expected, calls = decode(model), counted(monkeypatch)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = decode(model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert calls == [12, 1, 1, 1, 1, 1] and torch.equal(found, expected)


def test_what_failed_is_tried_anew_with_other_parts(opened, monkeypatch):
    model, calls = copy.deepcopy(opened("qwen3_next")), counted(monkeypatch)
    (module,) = linear(model)
    norm = module.norm
    module.norm = copy.deepcopy(norm)
    module.norm.forward = lambda x, gate: 2 * type(norm).forward(norm, x, gate)
    decode(model)  # it is not silent: nothing is tried
    assert module.is_quick is None
    own = type(norm).forward
    monkeypatch.setattr(type(norm), "forward", lambda self, *given: 2 * own(self, *given))
    module.norm = copy.deepcopy(norm)
    decode(model)
    assert module.is_quick is False
    monkeypatch.undo()
    decode(model)
    assert module.is_quick is False  # with these parts
    module.norm = norm
    decode(model)
    assert module.is_quick and not calls[20:]


def test_who_listens_to_projections_hears_the_tokens_alone(opened):
    model, heard = copy.deepcopy(opened("qwen3_next")), []
    (module,) = linear(model)
    hook = module.in_proj_qkvz.register_forward_hook(lambda _, args, __: heard.append(args[0].shape[1]))
    decode(model)
    assert heard == [12, 1, 1, 1, 1, 1]
    hook.remove()
    decode(model)
    assert module.is_quick


def test_training_and_what_has_no_cache_are_the_modules_own(opened, monkeypatch):
    model, calls = opened("qwen3_next"), counted(monkeypatch)
    model(torch.arange(3, 20)[None]).logits.sum().backward()
    with torch.no_grad():
        model(torch.arange(3, 20)[None], use_cache=False)
    assert not calls


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(1,), (2,), (7,), (70,), (150, 70), (64, 1, 66)], ids=str)
def test_prompts_whole_and_in_parts(family, dtype, lengths, opened, float32_products, monkeypatch):
    """A cache that the engine filled is what the modules' own code goes on from, and the other way round."""
    model, calls = opened(family, dtype), counted(monkeypatch)
    parts = torch.randint(3, 96, (2, sum(lengths)), generator=torch.Generator().manual_seed(0)).split(lengths, 1)

    def states(cache):
        layer = cache.layers[linear(model)[0].layer_idx]
        return [layer.conv_states[0], layer.recurrent_states[0]]

    def run(own):
        cache, found = DynamicCache(config=model.config), []
        for part, by_module in zip(parts, own, strict=True):
            linear(model)[0].is_quick = False if by_module else None
            with torch.inference_mode():
                found.append(model(part, past_key_values=cache, use_cache=True).logits)
        linear(model)[0].is_quick = None
        return [torch.cat(found, 1), *states(cache)]

    expected = run([True] * len(parts))
    assert not calls
    for own in ([False] * len(parts), [False, *[True] * (len(parts) - 1)], [True, *[False] * (len(parts) - 1)]):
        for one, other in zip(run(own), expected, strict=True):
            assert one.dtype == other.dtype
            assert (one - other).norm() < (1e-5 if dtype == torch.float32 else 0.02) * other.norm(), own
    assert {*lengths} <= {*calls}


def test_a_rollback_is_the_modules_own(opened, monkeypatch):
    """Candidates that are verified may be taken back, for which a cache keeps more of the past."""
    model, calls = opened("qwen3_next"), counted(monkeypatch)
    cache = DynamicCache(config=model.config)
    for layer in cache.layers:
        if hasattr(layer, "activate_past_recording"):
            layer.activate_past_recording()
    with torch.inference_mode():
        model(torch.arange(3, 20)[None], past_key_values=cache, use_cache=True)
    assert not calls


def test_adapters_of_projections_are_computed(opened, float32_products, monkeypatch):
    model = copy.deepcopy(opened("qwen3_next"))
    plain = decode(model)
    lora = LoraConfig(r=2, target_modules=["in_proj_qkvz", "out_proj"], init_lora_weights=False)
    adapted, calls = get_peft_model(model, lora).eval(), counted(monkeypatch)
    found = decode(adapted.base_model.model)
    assert calls and not torch.allclose(found, plain)
    with Own(adapted):
        assert_same(found, decode(adapted.base_model.model))


def test_copies_and_pickles_are_tried_anew(opened):
    model = opened("qwen3_next")
    decode(model)
    (module,) = linear(model)
    assert module.is_quick and "is_quick" not in module.__getstate__()
    assert copy.deepcopy(module).is_quick is None
    assert pickle.dumps(module.conv1d)
