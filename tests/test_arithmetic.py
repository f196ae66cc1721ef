"""Which activations experts compute with: int8 until they are adapted or trained, then bf16 whatever the mode."""

from __future__ import annotations

import copy

import pytest
import torch
from engine_cases import FORMATS, Batch, dense, name_of, options
from gradient_cases import random_lora

from coterie import ExpertLora, Experts, _native
from coterie.errors import ArgumentError

SIZES = (4, 128, 256)
QUANTISED = [FORMATS[1], FORMATS[6]]
SPECS = [FORMATS[0], *QUANTISED]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def made(spec, activations="auto") -> Experts:
    return Experts.pack(*dense(SIZES), **options(spec), activations=activations)


def lora(scale: float = 1.0) -> ExpertLora:
    factors = random_lora(SIZES, 8, torch.float32)
    return ExpertLora(**{name: f * scale if name.endswith("_b") else f for name, f in factors.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_the_same_bits_with_and_without_gradients_and_adapters_of_zeros(isa, spec, dtype):
    """Across chunks of 4096 tokens too, where the experts are not equally busy in each.

    On every instruction set each dtype and each format is cut into chunks once, and not every dtype of every format; by
    emulated tiles, which take seconds, one.
    """
    experts = made(spec, "bf16")
    chunks = DTYPES.index(dtype) == SPECS.index(spec) and not (isa == "amx_emulated" and dtype != torch.bfloat16)
    for tokens in (1, 40, 4100) if chunks else (1, 40):
        x, ids, weights = Batch(tokens, 2).tensors(SIZES)
        ids[: tokens // 2, 0] = 3
        x = x.to(dtype)
        expected = experts(x, ids, weights)
        given = x.clone().requires_grad_()
        assert torch.equal(experts(given, ids, weights), expected)
        assert torch.equal(experts(x, ids, weights, lora(0.0)), expected)
        assert torch.equal(experts(given, ids, weights, lora(0.0)), expected)
        adapted = experts(x, ids, weights, lora())
        assert torch.equal(experts(given, ids, weights, lora()), adapted) and not torch.equal(adapted, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_the_dtype_of_x_rounds_the_result_and_nothing_else(isa, spec, dtype):
    experts, (x, ids, weights) = made(spec), Batch(20, 2).tensors(SIZES)
    x = x.to(dtype)
    assert torch.equal(experts(x, ids, weights), experts(x.float(), ids, weights).to(dtype))


@pytest.mark.parametrize("how", ["differentiated", "an adapter", "said so"])
@pytest.mark.parametrize("spec", QUANTISED, ids=name_of)
def test_auto_is_int8_until_adapted(spec, how):
    experts, inputs = made(spec), Batch(20, 2).tensors(SIZES)
    fast, exact = (made(spec, kind)(*inputs) for kind in ("int8", "bf16"))
    assert not torch.equal(fast, exact) and torch.equal(experts(*inputs), fast)
    if how == "differentiated":
        assert torch.equal(experts(inputs[0].clone().requires_grad_(), *inputs[1:]), exact)
    elif how == "an adapter":
        experts(*inputs, lora())
    else:
        experts.adapt()
    twin = copy.deepcopy(experts)
    with torch.no_grad():
        assert torch.equal(experts(*inputs), exact) and torch.equal(twin(*inputs), exact)
    assert experts.activations == "auto"
    experts.activations = "auto"
    assert torch.equal(experts(*inputs), fast)


@pytest.mark.parametrize("spec", QUANTISED, ids=name_of)
def test_int8_is_not_for_training(spec):
    experts, (x, ids, weights) = made(spec, "int8"), Batch(5, 2).tensors(SIZES)
    for call in (
        lambda: experts(x.clone().requires_grad_(), ids, weights),
        lambda: experts(x, ids, weights, lora()),
        experts.adapt,
    ):
        with pytest.raises(ArgumentError, match="int8 activations are for inference"):
            call()


def test_what_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="expected one of auto, bf16, int8, found 'fp8'"):
        made(FORMATS[1], "fp8")
    with pytest.raises(ArgumentError, match="needs weights of int8, int4, mxfp4, nvfp4"):
        made(FORMATS[0], "int8")
    made(FORMATS[1], "bf16").save(tmp_path)
    assert Experts.open(tmp_path).activations == "auto"
    assert Experts.open(tmp_path, activations="int8").activations == "int8"


def test_an_adapter_without_gradients_runs_in_bounded_memory():
    """Nothing is kept for a backward pass, and four chunks take the workspace of one."""
    experts, sizes = made(FORMATS[1]), []
    for tokens in (4096, 16384):
        x, ids, weights = Batch(tokens, 2).tensors(SIZES)
        _native.release_workspace()
        with torch.no_grad():
            experts(x, ids, weights, lora())
        sizes.append(_native.workspace_bytes())
    assert sizes[1] <= 1.1 * sizes[0], sizes
