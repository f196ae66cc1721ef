"""What is done with rows of slots beside products: the activation, its gradient, and the sum of a token's slots."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.activations import Activation
from coterie.gpu.kernels.activation import activated
from coterie.gpu.kernels.decode import as_output, rounded

COLUMNS = 1024  # of a step, at most
ELEMENTS = 4096  # of a program's step


@triton.jit
def _activate(
    out, before, weights, rows, cols, stride, alpha, limit, offset,
    KIND: tl.constexpr, HAS_GATE: tl.constexpr, HAS_LIMIT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    column = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    there = (row < rows) & (column < cols)
    start = before + row * (2 * cols if HAS_GATE else cols) + column
    gate = tl.load(start, mask=there, other=0).to(tl.float32)
    up = tl.load(start + cols, mask=there, other=0).to(tl.float32) if HAS_GATE else gate
    hidden, _, _ = activated(gate, up, alpha, limit, offset, KIND, HAS_GATE, HAS_LIMIT)
    hidden = hidden * tl.load(weights + row, mask=row < rows, other=0)
    tl.store(out + row * stride + column, rounded(hidden), mask=there)


@triton.jit
def _slope(
    out, grad_weights, hidden_out, before, back, weights, rows, cols, stride, alpha, limit, offset,
    KIND: tl.constexpr, HAS_GATE: tl.constexpr, HAS_LIMIT: tl.constexpr, HIDDEN: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64)[:, None]
    width = 2 * cols if HAS_GATE else cols
    weight = tl.load(weights + row, mask=row < rows, other=0)
    total = tl.zeros([R, C], tl.float32)
    for first in range(0, cols, C):
        column = first + tl.arange(0, C)[None, :]
        there = (row < rows) & (column < cols)
        start = before + row * width + column
        gate = tl.load(start, mask=there, other=0).to(tl.float32)
        up = tl.load(start + cols, mask=there, other=0).to(tl.float32) if HAS_GATE else gate
        hidden, to_gate, to_up = activated(gate, up, alpha, limit, offset, KIND, HAS_GATE, HAS_LIMIT)
        grad = tl.load(back + row * cols + column, mask=there, other=0).to(tl.float32)
        total += tl.where(there, grad * hidden, 0.0)
        if HIDDEN:
            tl.store(hidden_out + row * cols + column, rounded(hidden * weight), mask=there)
        grad = grad * weight
        to = out + row * stride + column
        tl.store(to, rounded(grad * to_gate), mask=there)
        if HAS_GATE:
            tl.store(to + cols, rounded(grad * to_up), mask=there)
    tl.store(grad_weights + row, tl.sum(total, 1)[:, None], mask=row < rows)


@triton.jit
def _combine(out, rows, place, top_k, cols, OWN: tl.constexpr, C: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    total = tl.zeros([C], tl.float32)
    for k in range(top_k):
        slot = token * top_k + k
        row = tl.load(place + slot).to(tl.int64)
        there = column < tl.where(row < 0, 0, cols)
        if OWN:
            row = slot
        total += tl.load(rows + row * cols + column, mask=there, other=0).to(tl.float32)
    tl.store(out + token * cols + column, as_output(total, out), mask=column < cols)


def activate(activation: Activation, before: Tensor, weights: Tensor, has_gate: bool, more: int) -> Tensor:
    """See `gpu.rows.activated`."""
    rows, cols = len(before), before.shape[1] // (2 if has_gate else 1)
    out = before.new_empty(rows, cols + more)
    width, height = _tile(cols)
    grid = (triton.cdiv(rows, height), triton.cdiv(cols, width))
    if rows:
        _activate[grid](
            out, before, weights, rows, cols, cols + more, *_options(activation), **_kinds(activation, has_gate),
            R=height, C=width,
        )  # fmt: skip
    return out


def slope(
    activation: Activation, before: Tensor, back: Tensor, weights: Tensor, has_gate: bool, more: int, wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See `gpu.rows.slope`."""
    rows, cols = back.shape
    out = before.new_empty(rows, before.shape[1] + more)
    grad_weights = before.new_empty(rows, dtype=torch.float32)
    hidden = torch.empty_like(back) if wanted else None
    width, height = _tile(cols)
    if rows:
        _slope[(triton.cdiv(rows, height),)](
            out, grad_weights, hidden, before, back, weights, rows, cols, out.shape[1], *_options(activation),
            **_kinds(activation, has_gate), HIDDEN=wanted, R=height, C=width,
        )  # fmt: skip
    return out, grad_weights, hidden


def combine(rows: Tensor, place: Tensor, dtype: torch.dtype, own: bool = False) -> Tensor:
    """[T, cols] in `dtype`: the sum, in float32 and in the order of k, of the rows place[t, k], none where it is -1.

    own: rows are in the order of the slots, [T*K, cols]; `place` only says where there is none.
    """
    (batch, top_k), cols = place.shape, rows.shape[1]
    out = rows.new_empty(batch, cols, dtype=dtype)
    width = min(COLUMNS, triton.next_power_of_2(cols))
    if batch:
        grid = batch, triton.cdiv(cols, width)
        _combine[grid](out, rows, place.contiguous(), top_k, cols, OWN=own, C=width)
    return out


def _tile(cols: int) -> tuple[int, int]:
    width = min(COLUMNS, triton.next_power_of_2(cols))
    return width, max(1, ELEMENTS // width)


def _options(activation: Activation) -> tuple[float, float, float]:
    return activation.alpha, activation.limit, activation.up_offset


def _kinds(activation: Activation, has_gate: bool) -> dict[str, object]:
    return {"KIND": activation.native()[0], "HAS_GATE": has_gate, "HAS_LIMIT": activation.limit > 0}
