"""NaN, Inf and values at the ends of float32: they reach the tokens they belong to, and no others."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, Batch, assert_close, dense, engine_truth, name_of, options, packed

from coterie import Experts
from coterie.errors import ArgumentError
from coterie.formats import Format

SIZES = (3, 128, 256)
# Of formats whose scales are f16: what the largest weight is to the largest f16.
F16_MOST = {"q4_0": 8, "q8_0": 127, "iq4_nl": 127, "q4_k": 63 * 14, "q6_k": 128 * 32,
            "q5_k": 63 * 30, "q4_1": 14, "q5_0": 16, "q5_1": 30, "iq4_xs": 32 * 127, "q2_k": 15 * 2, "q3_k": 32 * 4}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_a_token_is_spoilt_alone(isa, spec, value):
    for batch in (Batch(3, 2), Batch(20, 1, spread=False)):
        x, ids, weights = batch.tensors(SIZES)
        clean = packed(spec, SIZES)(x, ids, weights)
        x[1, 77] = value
        found = packed(spec, SIZES)(x, ids, weights)
        assert not found[1].isfinite().any()
        others = torch.arange(len(x)) != 1
        assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("spec", [FORMATS[0], FORMATS[1], FORMATS[6]], ids=name_of)
def test_routing_weights_may_be_nan_zero_or_negative(isa, spec):
    x, ids, weights = Batch(4, 1).tensors(SIZES)
    positive = packed(spec, SIZES)(x, ids, weights)
    weights = weights * torch.tensor([[-1.0], [0.0], [float("nan")], [1.0]])
    found = packed(spec, SIZES)(x, ids, weights)
    assert torch.equal(found[0], -positive[0]) and torch.equal(found[3], positive[3])
    assert not found[1].any() and found[2].isnan().all()


@pytest.mark.parametrize("spec", [FORMATS[0], FORMATS[1], FORMATS[6], FORMATS[10]], ids=name_of)
@pytest.mark.parametrize("scale", [0.0, 1e-42, 1e-36, 1e-20, 1e15])
def test_tiny_and_huge_inputs(isa, spec, scale):
    x, ids, weights = Batch(9, 2).tensors(SIZES)
    x = x * scale
    found = packed(spec, SIZES)(x, ids, weights)
    assert found.isfinite().all()
    if scale in (0.0, 1e-42, 1e-36):
        assert found.abs().max() <= scale * 1e3
    else:
        assert_close(spec, found, engine_truth(packed(spec, SIZES), isa, x, ids, weights), scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", FORMATS[1:], ids=name_of)
def test_weights_that_a_quantised_format_cannot_hold_are_refused(isa, spec, value):
    gate, up, down = (w.clone() for w in dense(SIZES))
    up[2, 255, 127] = value
    with pytest.raises(ArgumentError, match="up of expert 2: NaN or Inf"):
        Experts.pack(gate, up, down, **options(spec))


def test_bf16_holds_nan_and_inf_in_weights(isa):
    gate, up, down = (w.clone() for w in dense(SIZES))
    down[0, 5, 7], down[0, 6, 8] = float("nan"), float("inf")
    experts = Experts.pack(gate, up, down, format="bf16")
    x, ids, weights = Batch(2, 1, spread=False).tensors(SIZES)
    found = experts(x, ids, weights)
    assert not found[:, 5:7].isfinite().any() and found[:, :5].isfinite().all() and found[:, 7:].isfinite().all()
    assert experts.dequantize_projection("down", 0)[5, 7].isnan()


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-30, 1e30])
def test_tiny_and_huge_weights_are_packed(isa, spec, scale):
    weight = dense(SIZES)[2][0] * scale
    experts = Experts.empty(1, *SIZES[1:], **options(spec))
    experts.pack_projection("down", 0, weight)
    found = experts.dequantize_projection("down", 0)
    assert found.isfinite().all()
    if spec.name in F16_MOST:  # from 2^-24 to 65504: smaller weights are zero, larger ones saturate
        assert found.abs().max() == (0 if scale < 1 else 65504 * F16_MOST[spec.name])
        return
    assert (found - weight).abs().max() <= weight.abs().max() * (0.2 if scale > 1e-37 else 1.01) + 1e-37


def test_int8_of_the_largest_values():
    experts = Experts.empty(1, 64, 16, format="int8")
    experts.pack_projection("up", 0, torch.full((16, 64), 3e38))
    assert experts.dequantize_projection("up", 0).isfinite().all()
    assert Format("int8") == experts.spec


@pytest.mark.parametrize("spec", [s for s in FORMATS[1:] if s.encoding.bits in (4, 8)], ids=name_of)
def test_zero_stays_zero_where_a_scale_has_no_inverse(isa, spec):
    weight = dense(SIZES)[2][0] * 1e-38
    weight[:, ::3] = 0
    experts = Experts.empty(1, *SIZES[1:], **options(spec))
    experts.pack_projection("down", 0, weight)
    found = experts.dequantize_projection("down", 0)
    assert not found[:, ::3].any() and found.abs().max() <= 1.01 * weight.abs().max()
