"""Every function between an expert's matrices, with and without a gate, limits and biases."""

from __future__ import annotations

import pytest
import torch
from engine_cases import Batch, assert_close, dense, engine_truth, name_of, options

from coterie import Activation, Experts, cpu
from coterie.activations import KINDS
from coterie.formats import Format

SPECS = [Format("bf16"), Format("int8"), Format("int4", 32)]
GPT_OSS = Activation("silu", alpha=1.702, limit=0.5, up_offset=1.0)
SIZES = (3, 96, 160)  # the last block of panels is not whole


def biases(scale: float = 0.5) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(9)
    count, hidden, intermediate = SIZES
    shapes = {"gate": intermediate, "up": intermediate, "down": hidden}
    return {f"{name}_bias": torch.randn(count, rows, generator=random) * scale for name, rows in shapes.items()}


def check(isa, spec, activation, has_gate=True, **given):
    experts = Experts.pack(*dense(SIZES, has_gate), **options(spec), activation=activation, **given)
    assert experts.has_gate is has_gate
    for batch in (Batch(1, 2), Batch(9, 2), Batch(40, 1, spread=False)):
        x, ids, weights = batch.tensors(SIZES)
        x = x * 3
        truth = engine_truth(experts, isa, x, ids, weights)
        assert_close(spec, experts(x, ids, weights), truth, batch)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "no-gate"])
@pytest.mark.parametrize("kind", KINDS)
def test_kinds(isa, kind, has_gate, spec):
    check(isa, spec, Activation(kind), has_gate)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_clamped_glu_with_biases(isa, spec):
    check(isa, spec, GPT_OSS, **biases())


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_biases_without_a_gate(isa, spec):
    given = biases()
    check(isa, spec, Activation("gelu"), has_gate=False, up_bias=given["up_bias"], down_bias=given["down_bias"])


@pytest.mark.parametrize("name", ["gate", "up", "down"])
def test_each_bias_alone(name):
    experts = Experts.pack(*dense(SIZES), format="bf16")
    bias = biases()[f"{name}_bias"]
    experts.set_biases(**{name: bias.bfloat16()})
    assert torch.equal(experts.biases()[name], bias.bfloat16().float()) and list(experts.biases()) == [name]
    x, ids, weights = Batch(3, 2).tensors(SIZES)
    assert_close(experts.spec, experts(x, ids, weights), engine_truth(experts, cpu.current_isa(), x, ids, weights))
    with_bias = experts(x, ids, weights)
    experts.set_biases()
    assert not experts.biases() and not torch.equal(experts(x, ids, weights), with_bias)


@pytest.mark.parametrize("kind", KINDS)
def test_large_preactivations_neither_overflow_nor_turn_nan(isa, kind):
    sizes = (1, 64, 64)
    experts = Experts.pack(*dense(sizes), format="bf16", activation=Activation(kind))
    x = torch.randn(4, 64) * 1e4
    ids, weights = torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
    truth = engine_truth(experts, isa, x, ids, weights)
    assert_close(Format("bf16"), experts(x, ids, weights), truth)
