"""Layers that decode a token by two calls of the engine, beside the same layers by their own code."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, DynamicCache

import coterie
from coterie import tiny
from coterie.hf.clock import Clock
from coterie.hf.inference.attention_mixer import AttentionMixer
from coterie.hf.inference.step import QuickLayer

EXPERTS, BLOCK = "experts", "block"
# What each layer of a family becomes: attention and experts by the engine, or attention alone; None: neither.
FAMILIES = {
    "qwen2_moe": [EXPERTS, EXPERTS],
    "qwen3_moe": [EXPERTS, EXPERTS],
    "mixtral": [EXPERTS, EXPERTS],
    "olmoe": [EXPERTS, EXPERTS],
    "glm4_moe": [BLOCK, EXPERTS, EXPERTS],  # the first has none
    "gpt_oss": [EXPERTS, EXPERTS],
    "minimax_m2": [BLOCK, BLOCK],
    "ernie4_5_moe": [None, None, None],  # turns neighbours
    "hunyuan_v1_moe": [None, None],  # norms behind the rotary embedding
    "phimoe": [None, None],  # layer norms
    "granitemoe": [EXPERTS, EXPERTS],
    "qwen3_next": [EXPERTS, EXPERTS],
    "qwen3_5_moe_text": [EXPERTS, EXPERTS],
    "deepseek_v3": [None, None, None],
}
TOKENS = 5


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """opened(family): a tiny model of it, all packed, in float32; the same for every test."""
    kept = {}

    def open_one(family: str, **changes):
        key = family, *sorted(changes)
        if key not in kept:
            folder = tmp_path_factory.mktemp(family)
            tiny_models.make(family, **changes).save_pretrained(folder)
            kept[key] = coterie.from_pretrained(folder, experts="bf16", dense="bf16", dtype=torch.float32)
        return kept[key]

    return open_one


def layers(model) -> list:
    return list(model.get_decoder().layers)


def taken(model) -> list[str | None]:
    """What the layers of a model have become."""
    steps = [getattr(layer, "quick_step", None) for layer in layers(model)]
    return [None if step is None else EXPERTS if step.with_experts else BLOCK for step in steps]


@contextmanager
def by_own_code(model) -> Iterator[None]:
    """Layers of a model as they were."""
    quick = [layer for layer in layers(model) if isinstance(layer, QuickLayer)]
    before = [(layer, type(layer)) for layer in quick]
    for layer, kind in before:
        layer.__class__ = next(k for k in kind.__mro__[1:] if not issubclass(k, QuickLayer))
    yield
    for layer, kind in before:
        layer.__class__ = kind


@contextmanager
def counted(monkeypatch) -> Iterator[list]:
    """Tokens that layers attend to by the engine's steps."""
    calls = []
    attend = AttentionMixer.__call__
    with monkeypatch.context() as patch:
        patch.setattr(AttentionMixer, "__call__", lambda *given: calls.append(1) or attend(*given))
        yield calls


def decode(model, sequences: int = 2, mask: torch.Tensor | None = None, **options) -> torch.Tensor:
    """Logits of TOKENS tokens decoded behind a prompt."""
    ids = torch.randint(3, 96, (sequences, 12), generator=torch.Generator().manual_seed(0))
    found = []
    with torch.inference_mode():
        cache = DynamicCache(config=model.config)
        given = {"past_key_values": cache, "use_cache": True, **options}
        model(input_ids=ids, attention_mask=mask, **given)
        for token in range(TOKENS):
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(sequences, 1)], 1)
            found.append(model(input_ids=torch.full((sequences, 1), 7 + token), attention_mask=mask, **given).logits)
    return torch.stack(found)


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, opened, float32_products):
    model = opened(family)
    found = decode(model)
    assert taken(model) == FAMILIES[family]
    with by_own_code(model):
        assert_same(found, decode(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_padded_sequences(family, opened, float32_products):
    model = opened(family)
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, :4] = 0
    found = decode(model, 3, mask)
    assert any(taken(model))
    with by_own_code(model):
        assert_same(found, decode(model, 3, mask))


def test_a_layer_that_limits_its_queries_is_left_alone(opened):
    model = opened("olmoe", clip_qkv=4.0)
    decode(model)
    assert taken(model) == [None, None] and all(layer.step_tried for layer in layers(model))


def test_another_layer_is_left_alone(opened, float32_products):
    """It has all the parts, and adds them up in another way."""
    model = copy.deepcopy(opened("granitemoe"))
    for layer in layers(model):
        layer.residual_multiplier = 0.5
    found = decode(model)
    assert taken(model) == [None, None]
    with by_own_code(model):
        assert torch.equal(found, decode(model))


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_a_block_that_adds_little_is_proved_too(scale, tmp_path, float32_products, monkeypatch):
    """With another score than a sigmoid, of shared experts that may be small beside what they are added to."""
    model = tiny_models.make("qwen2_moe")
    for layer in layers(model):
        layer.mlp.shared_expert.down_proj.weight.data *= scale
        layer.mlp.experts.down_proj.data *= scale
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    right = coterie.from_pretrained(tmp_path, experts="bf16", dense="bf16")
    decode(right)
    assert taken(right) == [EXPERTS, EXPERTS]
    monkeypatch.setattr("torch.nn.functional.sigmoid", lambda x: 3 * torch.tanh(x))
    wrong = coterie.from_pretrained(tmp_path, experts="bf16", dense="bf16")
    decode(wrong)
    assert taken(wrong) == [BLOCK, BLOCK]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_heads_that_are_no_multiple_of_16_columns(family, opened, float32_products):
    model = opened(family, head_dim=24)
    found = decode(model)
    assert not any(step == EXPERTS for step in taken(model)) or family == "qwen3_next"
    with by_own_code(model):
        assert_same(found, decode(model))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next"])
def test_what_is_wrapped_is_called(family, opened, float32_products):
    class Wrapped(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, *args, **kwargs):
            called.append(1)
            return self.module(*args, **kwargs)

    model, called = copy.deepcopy(opened(family)), []
    expected = decode(model)
    assert taken(model) == [EXPERTS, EXPERTS]
    for layer in layers(model):
        name = layer.quick_mixer.PLACE
        setattr(layer, name, Wrapped(getattr(layer, name)))
    assert_same(decode(model), expected)
    assert len(called) == 2 * (TOKENS + 1)
    other = copy.deepcopy(model)  # and where nothing was tried before
    assert_same(decode(other), expected)


def test_another_scale_of_attention(opened, float32_products):
    model = copy.deepcopy(opened("qwen3_moe"))
    decode(model)
    for layer in layers(model):
        layer.self_attn.scaling *= 2
    found = decode(model)
    with by_own_code(model):
        assert_same(found, decode(model))


def test_who_listens_is_told(opened, monkeypatch, float32_products):
    model = opened("qwen3_moe")
    expected = decode(model)
    for part in (layers(model)[0], layers(model)[0].self_attn, layers(model)[1].self_attn.v_proj, layers(model)[1].mlp):
        heard = []
        hook = part.register_forward_hook(lambda *_, heard=heard: heard.append(1))
        assert_same(decode(model), expected)
        hook.remove()
        assert len(heard) == TOKENS + 1
    with torch.inference_mode():
        out = model(torch.tensor([[5, 6]]), use_cache=True)
        out = model(torch.tensor([[7]]), past_key_values=out.past_key_values, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    with counted(monkeypatch) as calls:  # Transformers' hooks are still there, and idle
        decode(model)
    assert len(calls) == 2 * TOKENS
    assert taken(model) == [EXPERTS, EXPERTS]


def test_only_tokens_that_are_decoded_without_gradients(opened, monkeypatch, float32_products):
    model = copy.deepcopy(opened("qwen3_moe"))
    for layer in layers(model):
        layer.quick_step, layer.step_tried = None, False
    with counted(monkeypatch) as calls:
        model(torch.tensor([[5]]), use_cache=True)  # with gradients
        with torch.inference_mode():
            model(torch.tensor([[5, 6, 7]]), use_cache=True)  # a prompt
            model(torch.tensor([[5]]), use_cache=False)
            model.set_attn_implementation("eager")
            decode(model)
        assert not calls
        model.set_attn_implementation("coterie")
        decode(model)
        assert calls
        calls.clear()
        model.train()
        with torch.no_grad():
            decode(model)
        assert not calls


def test_adapters_of_attention_are_computed(float32_products):
    model = coterie.from_pretrained(tiny.PATH, experts="bf16", dense="int8")
    ids = AutoTokenizer.from_pretrained(tiny.PATH)("Assignment statements", return_tensors="pt").input_ids

    def generated(model) -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)

    generated(model)
    assert taken(model) == [EXPERTS] * 4
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    found = generated(adapted)
    with by_own_code(model):
        assert torch.equal(found, generated(adapted))


def test_what_is_dequantised_is_computed(float32_products):
    model = coterie.from_pretrained(tiny.PATH, experts="bf16", dense="bf16", dtype=torch.float32)
    expected = decode(model)
    assert taken(model) == [EXPERTS] * 4
    model.dequantize()
    error = (decode(model) - expected).norm() / expected.norm()
    assert 0 < error < 0.02  # torch does not round activations


def test_copies_begin_anew(opened, float32_products):
    model = opened("qwen3_moe")
    expected = decode(model)
    other = copy.deepcopy(model)
    assert taken(model) == [EXPERTS] * 2 and taken(other) == [None] * 2
    other.model.layers[0].input_layernorm.weight.data.zero_()
    assert not torch.equal(decode(other), expected)
    assert taken(other) == [EXPERTS] * 2
    assert torch.equal(decode(model), expected)


def test_caches_that_are_cut_go_on(opened, float32_products):
    """As speculation does, whose drafts are taken back."""
    model = opened("qwen3_moe")
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(3))

    def run() -> torch.Tensor:
        found = []
        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            model(ids, past_key_values=cache, use_cache=True)
            for token in range(4):
                for draft in range(3):
                    out = model(torch.tensor([[9 + token + draft]]), past_key_values=cache, use_cache=True)
                    found.append(out.logits)
                cache.crop(-2)
        return torch.stack(found)

    found = run()
    with by_own_code(model):
        assert_same(found, run())


def test_a_clock_tells_the_parts_of_a_step(opened):
    model = opened("qwen3_moe")
    decode(model, 1)
    with Clock(model) as clock:
        decode(model, 1)
    _, *tokens = clock.forwards
    assert len(tokens) == TOKENS
    layer = layers(model)[0]
    linears = sum(p.packed.linear.nbytes for p in layer.quick_step.parts.projections)
    experts = layer.mlp.experts.packed_module.experts
    for outside, *parts in tokens:
        assert len(parts) == 2 and outside.products > 0
        for part in parts:
            assert part.nbytes == linears + 2 * experts.nbytes / experts.num_experts
            assert part.seconds > part.products > 0 and part.attention > 0 and part.rest > 0
    assert taken(model) == [EXPERTS] * 2


def test_the_clock_sees_a_layer_without_experts(opened):
    model = opened("glm4_moe")
    decode(model, 1)
    with Clock(model) as clock:
        decode(model, 1)
    for outside, *parts in clock.forwards[1:]:
        assert outside.rest > 0 and all(part.seconds > part.products > 0 and part.attention > 0 for part in parts)
    assert taken(model) == FAMILIES["glm4_moe"]
