"""The function between an expert's matrices and its slope, in the registers of a Triton kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from coterie.activations import KINDS

SILU = tl.constexpr(KINDS.index("silu"))
GELU = tl.constexpr(KINDS.index("gelu"))
GELU_TANH = tl.constexpr(KINDS.index("gelu_tanh"))
RELU = tl.constexpr(KINDS.index("relu"))
ROOT_HALF = tl.constexpr(0.7071067811865476)
BELL = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
# (1 + tanh) / 2 of gelu's approximation is a sigmoid, of LINEAR x + CUBIC x^3: twice sqrt(2 / pi), and .044715 of that.
LINEAR = tl.constexpr(1.5957691216057308)
CUBIC = tl.constexpr(0.07135481627159967)
SLOPE = tl.constexpr(0.21406444881479902)  # 3 CUBIC


@triton.jit
def curve(x, alpha, KIND: tl.constexpr):
    """act(x) and its slope; `alpha` is silu's."""
    if KIND == SILU:
        gate = tl.sigmoid(alpha * x)
        return x * gate, gate + alpha * x * gate * (1 - gate)
    elif KIND == GELU:
        half = 0.5 * (1 + tl.erf(x * ROOT_HALF))
        return x * half, half + x * tl.exp(-0.5 * x * x) * BELL
    elif KIND == GELU_TANH:
        square = x * x
        half = tl.sigmoid(x * (LINEAR + CUBIC * square))
        return x * half, half + x * half * (1 - half) * (LINEAR + SLOPE * square)
    elif KIND == RELU:
        return tl.maximum(x, 0.0), tl.where(x > 0, 1.0, 0.0)
    else:
        x = tl.maximum(x, 0.0)
        return x * x, 2 * x


@triton.jit
def activated(gate, up, alpha, limit, offset, KIND: tl.constexpr, HAS_GATE: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """(act, its gradient in gate, its gradient in up) of float32 values; gate's is of no use without one."""
    if not HAS_GATE:
        out, slope = curve(up, alpha, KIND)
        return out, slope, slope
    x, factor = gate, up
    if HAS_LIMIT:
        x, factor = tl.minimum(x, limit), tl.minimum(tl.maximum(up, -limit), limit)
    act, slope = curve(x, alpha, KIND)
    to_gate, to_up = slope * (factor + offset), act
    if HAS_LIMIT:
        to_gate = tl.where(gate <= limit, to_gate, 0.0)
        to_up = tl.where(tl.abs(up) <= limit, to_up, 0.0)
    return act * (factor + offset), to_gate, to_up
