"""Gated MLPs of packed layers, dense ones and shared experts, of decoded tokens as one call of the engine."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_step import assert_same, decode
from tiny_models import make
from transformers.activations import ACT2FN

import coterie
from coterie import _native
from coterie.activations import KINDS, Activation
from coterie.hf.clock import Clock
from coterie.hf.inference.gated import QuickGated

# How many such MLPs the tiny models have.
FAMILIES = {"qwen2_moe": 2, "qwen3_next": 2, "glm4_moe": 3, "deepseek_v3": 3, "ernie4_5_moe": 3, "hunyuan_v1_moe": 2}
SILU = Activation("silu").native()


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """opened(family, dense, dtype): a tiny model of it, the same for every test."""
    kept = {}

    def open_one(family, dense="bf16", dtype=torch.float32):
        key = family, dense, dtype
        if key not in kept:
            folder = tmp_path_factory.mktemp(family)
            make(family, shared_expert_intermediate_size=64).save_pretrained(folder)
            kept[key] = coterie.from_pretrained(folder, experts="bf16", dense=dense, dtype=dtype)
        return kept[key]

    return open_one


def gated(model) -> list[QuickGated]:
    return [module for module in model.modules() if isinstance(module, QuickGated)]


class Own:
    """The modules' own code, while inside."""

    def __init__(self, model):
        self.modules = gated(model)

    def __enter__(self):
        for module in self.modules:
            module.quick_kind, module.kind_parts = None, tuple(module.children())

    def __exit__(self, *_):
        for module in self.modules:
            module.kind_parts = None


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, opened, float32_products):
    model = opened(family)
    found = decode(model)
    assert [module.quick_kind for module in gated(model)] == [SILU] * FAMILIES[family]
    with Own(model):
        assert_same(found, decode(model))


@pytest.mark.parametrize("dense", ["int8", "int4", "fp8_block"])
@pytest.mark.parametrize("family", ["qwen2_moe", "glm4_moe"])
def test_formats(dense, family, opened, float32_products):
    model = opened(family, dense, torch.bfloat16)
    found = decode(model)
    assert all(module.quick_kind == SILU for module in gated(model))
    with Own(model):
        expected = decode(model)
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_kinds(kind, scale, opened, float32_products):
    """Told apart whatever the size of what goes into them."""
    (module, *_) = gated(copy.deepcopy(opened("qwen2_moe")))
    module.act_fn = {
        "silu": torch.nn.SiLU(), "gelu": torch.nn.GELU(), "gelu_tanh": torch.nn.GELU("tanh"), "relu": torch.nn.ReLU(),
        "relu2": ACT2FN["relu2"],
    }[kind]  # fmt: skip
    x = torch.randn(3, 1, 64) * scale
    with torch.no_grad():
        found = module(x)
        with Own(module):
            assert_same(found, module(x))


class Limited(torch.nn.SiLU):
    def forward(self, x):
        return super().forward(x).clamp(max=2)


@pytest.mark.parametrize("act", [torch.nn.Hardswish(), Limited(), torch.nn.Mish()])
def test_another_gate_is_left_alone(act, opened, float32_products):
    (module, *_) = gated(copy.deepcopy(opened("qwen2_moe")))
    module.act_fn = act
    x = torch.randn(3, 64)
    with torch.no_grad():
        first = module(x)
        assert module.kind_parts and module.quick_kind is None
        assert torch.equal(module(x), first)


def test_adapters_and_hooks_are_heard(opened, float32_products):
    model = copy.deepcopy(opened("qwen2_moe"))
    plain = decode(model)
    seen = []
    hook = gated(model)[0].up_proj.register_forward_hook(lambda *_: seen.append(1))
    assert_same(decode(model), plain)
    hook.remove()
    assert len(seen) > 4
    lora = LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    adapted = get_peft_model(model, lora).eval()
    found = decode(adapted.base_model.model)
    assert not torch.allclose(found, plain)
    with Own(adapted):
        assert_same(found, decode(adapted.base_model.model))


def test_training_and_prompts_are_the_modules_own(opened, monkeypatch):
    calls, call = [], _native.gated
    monkeypatch.setattr(_native, "gated", lambda *given: calls.append(1) or call(*given))
    model = opened("qwen2_moe")
    model(torch.arange(3, 40)[None]).logits.sum().backward()
    with torch.no_grad():
        model(torch.arange(3, 40)[None])
    assert not calls


def test_another_activation_is_tried(opened):
    model = copy.deepcopy(opened("qwen2_moe", "int8", torch.bfloat16))
    mlp, x = gated(model)[0], torch.randn(1, 1, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        before = mlp(x)
        assert mlp.quick_kind is not None
        mlp.act_fn = torch.nn.ReLU()
        found = mlp(x)
        mlp.quick_kind, mlp.kind_parts = None, tuple(mlp.children())
        expected = mlp(x)
    assert (found - expected).norm() < 0.02 * expected.norm() < (before - expected).norm()


def test_a_clock_counts_them_as_products(opened):
    model = opened("qwen2_moe", "int8", torch.bfloat16)
    decode(model, sequences=1)
    with Clock(model) as clock:
        decode(model, sequences=1)
    layer = clock.forwards[-1][1]
    (mlp, *_) = gated(model)
    whole = sum(part.packed.linear.nbytes for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    assert layer.nbytes > whole and 0 < layer.products <= layer.seconds


def test_matrices_and_tensors_that_do_not_fit_are_not_taken():
    weight = {
        name: coterie.Linear.pack(torch.randn(*shape), format=format).weight
        for name, shape, format in (
            ("gate", (48, 64), "int8"), ("up", (48, 64), "int8"), ("down", (64, 48), "int8"),
            ("other", (48, 64), "bf16"), ("longer", (32, 64), "int8"),
        )
    }  # fmt: skip
    x = torch.randn(2, 1, 64)
    call = lambda gate="gate", up="up", down="down", x=x: _native.gated(  # noqa: E731
        weight[gate], weight[up], weight[down], x, SILU, True
    )
    assert call().shape == x.shape
    assert call(up="other") is None and call(up="longer") is None and call(down="gate") is None
    assert call(x=torch.randn(2, 63)) is None and call(x=x.double()) is None and call(x=x.expand(2, 2, 64)) is None
