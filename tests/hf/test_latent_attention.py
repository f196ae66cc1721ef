"""Attention to latents by the engine while a model decodes, beside the models' own code."""

from __future__ import annotations

import pickle
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_step import EXPERTS, assert_same, by_own_code, decode, taken
from tiny_models import COMMON, LATENT_ATTENTION, make, prompt, strengthen
from tiny_models import FAMILIES as TINY
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Mistral4ForCausalLM

import coterie
from coterie import _native
from coterie.hf.inference.latent import EXPANSION, Expanded, Expansion, QuickLatent

SIZES = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "v_head_dim": 24}
BLOCKS = {"qk_nope_head_dim": 128, "v_head_dim": 64}  # of which heads are whole blocks of a packed matrix
# What each layer of a family becomes where all is packed.
FAMILIES = {
    "deepseek_v2": ["block", EXPERTS, EXPERTS],
    "deepseek_v3": ["block", EXPERTS, EXPERTS],
    "glm4_moe_lite": ["block", EXPERTS, EXPERTS],
}
SPARSE = ["glm_moe_dsa", "kimi_linear"]
WAYS = [{}, {"q_lora_rank": None}, {"rope_interleave": False}]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """opened(family, dense, dtype): a tiny model of it, the same for every test."""
    kept = {}

    def open_one(family, dense=None, dtype=torch.float32, **changes):
        key = family, dense, dtype, *sorted(changes.items())
        if key not in kept:
            folder = tmp_path_factory.mktemp(family)
            make(family, **SIZES | changes).save_pretrained(folder)
            kept[key] = coterie.from_pretrained(folder, experts="bf16", dense=dense, dtype=dtype)
        return kept[key]

    return open_one


def modules(model) -> list[QuickLatent]:
    return [module for module in model.modules() if isinstance(module, QuickLatent)]


@pytest.fixture
def calls(monkeypatch) -> list:
    """The queries of each call of the engine."""
    found = []
    attend = _native.attend_latents
    monkeypatch.setattr(_native, "attend_latents", lambda *given: found.append(given[0]) or attend(*given))
    return found


@contextmanager
def own(model):
    """Keys and values made of all latents for each token."""
    before = [(module, type(module)) for module in modules(model)]
    with by_own_code(model):
        for module, kind in before:
            module.__class__ = kind.__mro__[2]
        yield
        for module, kind in before:
            module.__class__ = kind


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dense", [None, "bf16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_families(family, dense, dtype, opened, float32_products, calls):
    if dense == "int8" and dtype == torch.float32:
        pytest.skip("activations rounded to int8 are not those of floats")
    model = opened(family, dense, dtype)
    found = decode(model)
    assert calls or dense
    assert len(modules(model)) == 3 and all(module.latent_weight is not None for module in modules(model))
    if dense == "bf16" and dtype == torch.float32:
        assert taken(model) == FAMILIES[family]
    with own(model):
        expected = decode(model)
    if dtype == torch.float32:
        assert_same(found, expected)
    else:
        exact = decode(opened(family, "bf16"))
        found, expected = ((logits.float() - exact).norm() / exact.norm() for logits in (found, expected))
        assert found < 1.25 * expected < 0.4


@pytest.mark.parametrize("family", SPARSE)
def test_models_that_choose_positions_or_mix_kinds_of_attention(family, tmp_path, float32_products, calls):
    chosen = {"index_topk": 8} if family == "glm_moe_dsa" else {}
    make(family, **SIZES, **chosen).save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, experts="bf16", dtype=torch.float32)
    found = decode(model)
    assert calls and all(module.latent_weight is not None for module in modules(model))
    with own(model):
        assert_same(found, decode(model))


@pytest.mark.parametrize("changes", WAYS)
def test_ways_to_make_queries_and_to_turn_them(changes, opened, float32_products):
    model = opened("deepseek_v3", "bf16", **changes)
    found = decode(model, 3)
    assert taken(model) == FAMILIES["deepseek_v3"]
    with own(model):
        assert_same(found, decode(model, 3))


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_matrix_is_read_as_it_is_packed(sequences, opened, float32_products):
    model = opened("glm4_moe_lite", "bf16", **BLOCKS)
    found = decode(model, sequences)
    assert taken(model) == FAMILIES["glm4_moe_lite"]
    assert all(isinstance(module.latent_weight[0], _native.Linear) for module in modules(model))
    for other in (own, by_own_code):
        with other(model):
            assert_same(found, decode(model, sequences))


@pytest.mark.parametrize("dense", [None, "bf16"])
def test_padded_sequences(dense, opened, float32_products):
    model = opened("glm4_moe_lite", dense)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :4] = 0
    found = decode(model, 3, mask)
    with own(model):
        assert_same(found, decode(model, 3, mask))


def test_prompts_in_parts_have_their_keys_made(opened, float32_products, calls):
    model, ids = opened("deepseek_v2"), prompt(2, 12)
    with torch.inference_mode():
        first = model(input_ids=ids[:, :7], use_cache=True)
        second = model(input_ids=ids[:, 7:], past_key_values=first.past_key_values, use_cache=True)
        assert not calls
        assert_same(torch.cat([first.logits, second.logits], 1), model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["deepseek_v2", "glm_moe_dsa"])
def test_few_tokens_behind_many(family, opened, float32_products, calls):
    """Those of speculation, or the end of a conversation that is read anew: by latents, with the mask of each."""
    model, ids = opened(family), prompt(2, 60)
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[1, :9] = 0
    with torch.inference_mode():
        whole = model(input_ids=ids, attention_mask=mask).logits
        cache = model(input_ids=ids[:, :55], attention_mask=mask[:, :55], use_cache=True).past_key_values
        assert not calls
        found = model(input_ids=ids[:, 55:], attention_mask=mask, past_key_values=cache).logits
    assert len(calls) == 3 * 5
    assert_same(found, whole[:, 55:])


def test_gradients_are_the_models_own(opened, calls):
    model = opened("deepseek_v3")
    model(input_ids=prompt(1, 1)).logits.sum().backward()
    assert not calls


def test_an_adapter_on_what_makes_keys_and_values(tmp_path, float32_products, calls):
    make("deepseek_v3", **SIZES).save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, experts="bf16", dtype=torch.float32, activations="bf16")
    expected = decode(model)
    adapted = get_peft_model(model, LoraConfig(target_modules=[EXPANSION], init_lora_weights=False))
    calls.clear()
    found = decode(adapted)
    assert not calls and not torch.allclose(found, expected, rtol=1e-2)
    with adapted.disable_adapter():
        assert_same(decode(adapted), expected)


def test_a_weight_that_is_trained_is_read_as_it_is(tmp_path, float32_products):
    make("deepseek_v3", **SIZES).save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, experts="bf16", dtype=torch.float32, activations="bf16")
    before = decode(model)
    with torch.no_grad():
        for module in modules(model):
            module._modules[EXPANSION].weight.mul_(1.5)
    found = decode(model)
    assert not torch.allclose(found, before, rtol=1e-2)
    with own(model):
        assert_same(found, decode(model))


def test_hooks_and_other_expansions_are_heard(opened, float32_products, calls):
    model = opened("glm4_moe_lite")
    decode(model)
    module, seen = modules(model)[0], []
    handle = module._modules[EXPANSION].register_forward_hook(lambda *given: seen.append(given))
    calls.clear()
    decode(model)
    handle.remove()
    assert len(seen) == 6 and len(calls) == 2 * 5


def test_a_hook_hears_no_trial(tmp_path, float32_products):
    make("deepseek_v3", **SIZES).save_pretrained(tmp_path)
    model, seen = coterie.from_pretrained(tmp_path, experts="bf16", dtype=torch.float32), []
    handle = modules(model)[0]._modules[EXPANSION].register_forward_pre_hook(lambda *given: seen.append(given))
    expected = decode(model, 1)
    assert len(seen) == 6 and not any(latents[0].shape[-2] == 3 for _, latents in seen)
    handle.remove()
    assert_same(decode(model, 1), expected)


def test_a_matrix_that_becomes_another_is_seen(tmp_path, float32_products, calls):
    make("deepseek_v3", **SIZES).save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, experts="bf16", dtype=torch.float32)
    decode(model)
    layers = [module._modules[EXPANSION] for module in modules(model)]
    layers[0].bias = nn.Parameter(torch.ones(layers[0].out_features), requires_grad=False)
    parametrize.register_parametrization(layers[1], "weight", nn.Identity())
    calls.clear()
    found = decode(model)
    assert len(calls) == 5
    with own(model):
        assert_same(found, decode(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_cached_is_what_the_model_caches(family, tmp_path):
    """Small weights, as Transformers makes them: of scores so small any turn of queries and keys answers alike."""
    config = AutoConfig.for_model(family, **COMMON | TINY[family] | SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, experts="bf16", dense="bf16").eval()
    found, expected = cached(model), None
    assert any(taken(model))
    with own(model):
        expected = cached(model)
    for layer, other in zip(found.layers, expected.layers, strict=True):
        for a, b in ((layer.keys, other.keys), (layer.values, other.values)):
            assert (a.float() - b.float()).norm() < 0.03 * b.float().norm()


def cached(model) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for ids in (prompt(2, 12), *prompt(2, 4).split(1, dim=1)):
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    return cache


def test_a_layer_that_scales_queries_by_their_positions_is_left_alone(tmp_path, float32_products):
    positions = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}
    positions |= {"llama_4_scaling_beta": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1}
    sizes = COMMON | LATENT_ATTENTION | SIZES | {"n_routed_experts": 8, "moe_intermediate_size": 96}
    config = AutoConfig.for_model("mistral4", **sizes, rope_parameters=positions)
    theirs = Mistral4ForCausalLM._from_config(config, dtype=torch.float32)
    strengthen(theirs)
    theirs.save_pretrained(tmp_path)
    options = {"experts": "bf16", "dense": "bf16", "dtype": torch.float32, "auto_class": Mistral4ForCausalLM}
    model = coterie.from_pretrained(tmp_path, **options).eval()
    found = decode(model)
    assert not any(taken(model))
    with own(model):
        assert_same(found, decode(model))


def test_another_attention_gets_ordinary_tensors(opened, float32_products, calls):
    model = opened("deepseek_v2")
    expected = decode(model)
    for implementation, by_latents in (("sdpa", True), ("eager", False)):
        calls.clear()
        model.set_attn_implementation(implementation)
        found = decode(model)
        model.set_attn_implementation("coterie")
        assert bool(calls) == by_latents
        assert_same(found, expected)


def test_states_are_made_when_something_asks():
    asked = []

    def expand(latents, turned):
        asked.append(1)
        return latents.expand(-1, 2, -1, -1) * 2, turned.expand(-1, 2, -1, -1)

    latents, turned = torch.randn(1, 1, 5, 16), torch.randn(1, 1, 5, 16)
    expansion = Expansion(expand, latents[0, 0], latents, turned)
    keys, values = (Expanded(expansion, 2, 16, kind) for kind in ("keys", "values"))
    assert keys.shape == (1, 2, 5, 16) and keys.dtype == torch.float32 and not asked
    assert torch.equal(keys.transpose(2, 3) + 1, latents.expand(-1, 2, -1, -1).transpose(2, 3) * 2 + 1)
    assert torch.equal(torch.cat([values, values]), torch.cat([turned.expand(-1, 2, -1, -1)] * 2))
    assert len(asked) == 1


def test_a_model_is_copied_without_what_was_tried(opened):
    model = opened("deepseek_v3")
    decode(model, 1)
    module = modules(model)[0]
    assert module.latent_proved is not None
    assert not {"latent_proved", "latent_weight"} & module.__getstate__().keys()
    assert pickle.dumps(module._modules[EXPANSION])
