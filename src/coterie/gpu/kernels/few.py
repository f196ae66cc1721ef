"""Experts of a few tokens, multiplied with their codes as they are packed.

Two kernels, the matrices before the activation and the one behind it, then the sum of each token's slots. A slot is a
token and one of its experts. Of few slots each reads the codes of its expert; of more, those of an expert are
multiplied together, 16 at a time. Programs find these themselves, so that nothing is sorted before.

Codes are read as words of 32 bits, P codes each. Activations lie in P planes, of every P-th column, so that the codes
that stand at one place of their words meet neighbours. A code is not moved to the end of its word: it is worth 16 or
256 times as much for each place before it, and its plane that much less.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.activations import Activation
from coterie.gpu.kernels.activation import activated
from coterie.gpu.kernels.decode import (
    INTERPRETED,
    NUMBER,
    as_bytes,
    as_output,
    kind_of_codes,
    kind_of_scales,
    middle_of,
    number,
    rounded,
    table_of,
    value,
)
from coterie.gpu.kernels.rows import combine
from coterie.gpu.matrices import Matrices

SINGLE_SLOTS = 64  # up to which each slot has programs of its own
# Of a program: rows, words of a step, warps; on an H200 the fastest of a dozen.
SINGLE = 8, 32, 2
TOGETHER = 64, 16, 4
TOKENS = tl.constexpr(16)  # of an expert together
GROUP = 64  # columns that are taken together where scales are those of rows


@triton.jit
def _place(part: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr):
    """What a code at this place of a word is worth more than its value: a power of two."""
    if KIND != NUMBER or BITS == 16:
        return 1.0
    elif BITS == 4:
        return 16.0 ** (part % 5)
    else:
        return 256.0 ** (part % 2)


@triton.jit
def _masked(word, MASK: tl.constexpr):
    """The bits of 2^23 with some of a word's at their end; one instruction, which the compiler does not find."""
    if INTERPRETED:
        return (word & MASK) | 0x4B000000
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xea;", "=r,r,r,r", [word, MASK, 0x4B000000], dtype=tl.int32, is_pure=True, pack=1
        )


@triton.jit
def _part(word, less, table, part: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr):
    """Float32 of one code of each word, times `_place`; `less`: zero points."""
    if BITS == 16:
        return ((word << 16) if part == 0 else (word & -65536)).to(tl.float32, bitcast=True)
    elif KIND == NUMBER:
        kept: tl.constexpr = 5 if BITS == 4 else 2  # places whose codes are within 23 bits
        mask: tl.constexpr = ((1 << BITS) - 1) << (BITS * (part % kept))
        start = 8388608.0 + _place(part, BITS, KIND) * (MIDDLE + less)
        return _masked(word >> (BITS * kept * (part // kept)), mask).to(tl.float32, bitcast=True) - start
    else:
        return value((word >> (BITS * part)) & ((1 << BITS) - 1), table, KIND, MIDDLE)


@triton.jit
def _factor(
    scale, row_scale, expert, row, group, rows, groups, scale_rows,
    SCALE: tl.constexpr, TILE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ROW: tl.constexpr,
):  # fmt: skip
    """Float32 [n, g], the scales of rows [n] and groups [g]."""
    row, group = row[:, None], group[None, :]
    there = (row < rows) & (group < groups)
    factor = tl.where(there, 1.0, 0.0)
    if HAS_SCALE:
        where = expert * scale_rows * groups + (row // TILE) * groups + group
        factor = number(tl.load(scale + where, mask=there, other=0), SCALE)
    if HAS_ROW:
        factor = factor * tl.load(row_scale + expert * rows + row, mask=row < rows, other=0)
    return factor


@triton.jit
def _words(codes, expert, row, group, rows, words, PER: tl.constexpr):
    """Int32 [n, g, k] of rows [n] and groups [g] of `PER` words."""
    row = row[:, None, None]
    word = group[None, :, None] * PER + tl.arange(0, PER)[None, None, :]
    return tl.load(codes + expert * rows * words + row * words + word, mask=(row < rows) & (word < words), other=0)


@triton.jit
def _less(zero, expert, row, group, rows, groups, HAS_ZERO: tl.constexpr, PER_ROW: tl.constexpr):
    """Zero points of rows [n] and groups [g], float32 [n, g], or none."""
    if HAS_ZERO:
        row, group = row[:, None], group[None, :]
        where = expert * rows + row if PER_ROW else (expert * rows + row) * groups + group
        return tl.load(zero + where, mask=(row < rows) & (group < groups), other=0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def _write(
    out, gate, up, weight, gate_bias, up_bias, expert, slot, row, rows, stride, alpha, limit, offset, there,
    ACT: tl.constexpr, HAS_GATE: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_BIAS: tl.constexpr, PARTS: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """What sums of products become: with an activation, act times the routing weight, as planes of the next matrix."""
    if HAS_BIAS:
        bias = tl.load(up_bias + expert * rows + row, mask=row < rows, other=0)
        up += bias if ACT >= 0 else bias * weight
        if HAS_GATE:
            gate += tl.load(gate_bias + expert * rows + row, mask=row < rows, other=0)
    to = row
    if ACT >= 0:
        up, _, _ = activated(gate, up, alpha, limit, offset, ACT, HAS_GATE, HAS_LIMIT)
        up *= weight
        to = (row % PARTS) * (stride // PARTS) + row // PARTS
        up *= _shrink(row % PARTS, PARTS, KIND)
    tl.store(out + slot.to(tl.int64) * stride + to, as_output(up, out), mask=there)


@triton.jit
def _shrink(part, PARTS: tl.constexpr, KIND: tl.constexpr):
    """The reciprocal of `_place`, of places that are numbers."""
    if KIND != NUMBER or PARTS == 2:
        return 1.0
    elif PARTS == 8:
        return tl.exp2(-4.0 * (part % 5).to(tl.float32))
    else:
        return tl.exp2(-8.0 * (part % 2).to(tl.float32))


@triton.jit
def _planes(out, x, cols, stride, PARTS: tl.constexpr, KIND: tl.constexpr, C: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * C + tl.arange(0, C)
    values = tl.load(x + token * cols + column, mask=column < cols, other=0).to(tl.float32)
    to = (column % PARTS) * (stride // PARTS) + column // PARTS
    tl.store(out + token * stride + to, rounded(values * _shrink(column % PARTS, PARTS, KIND)), mask=column < cols)


@triton.jit
def _single(
    out, x, ids, weights, gate_codes, gate_scale, gate_row, gate_zero, gate_bias, up_codes, up_scale, up_row, up_zero,
    up_bias, table, slots, per_token, rows, words, groups, scale_rows, out_stride, alpha, limit, offset,
    BITS: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr, SCALE: tl.constexpr, PER: tl.constexpr,
    TILE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ROW: tl.constexpr, HAS_ZERO: tl.constexpr,
    ACT: tl.constexpr, HAS_GATE: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    OUT_PARTS: tl.constexpr, OUT_KIND: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """N rows of one slot's expert."""
    slot = tl.program_id(0)
    expert = tl.load(ids + slot).to(tl.int64)
    if expert < 0:
        return
    PARTS: tl.constexpr = 32 // BITS
    row = tl.program_id(1) * N + tl.arange(0, N)
    start = x + (slot // per_token) * PARTS * words
    gate = tl.zeros([N, G], tl.float32)
    up = tl.zeros([N, G], tl.float32)
    for first in range(0, groups, G):
        group = first + tl.arange(0, G)
        word = group[None, :, None] * PER + tl.arange(0, PER)[None, None, :]
        # Loaded by each thread for the words it has: cheaper than handed over from another.
        here = tl.broadcast_to(start + word, [N, G, PER])
        inside = tl.broadcast_to(word < words, [N, G, PER])
        up_words = _words(up_codes, expert, row, group, rows, words, PER)
        up_less = _less(up_zero, expert, row, group, rows, groups, HAS_ZERO, not HAS_SCALE)
        up_sum = tl.zeros([N, G, PER], tl.float32)
        if HAS_GATE:
            gate_words = _words(gate_codes, expert, row, group, rows, words, PER)
            gate_less = _less(gate_zero, expert, row, group, rows, groups, HAS_ZERO, not HAS_SCALE)
            gate_sum = tl.zeros([N, G, PER], tl.float32)
        up_zero_of = up_less[:, :, None] if HAS_ZERO else up_less
        gate_zero_of = gate_less[:, :, None] if HAS_ZERO and HAS_GATE else up_zero_of
        for part in tl.static_range(PARTS):
            inputs = tl.load(here + part * words, mask=inside, other=0).to(tl.float32)
            up_sum += _part(up_words, up_zero_of, table, part, BITS, KIND, MIDDLE) * inputs
            if HAS_GATE:
                gate_sum += _part(gate_words, gate_zero_of, table, part, BITS, KIND, MIDDLE) * inputs
        up += tl.sum(up_sum, 2) * _factor(
            up_scale, up_row, expert, row, group, rows, groups, scale_rows, SCALE, TILE, HAS_SCALE, HAS_ROW
        )
        if HAS_GATE:
            gate += tl.sum(gate_sum, 2) * _factor(
                gate_scale, gate_row, expert, row, group, rows, groups, scale_rows, SCALE, TILE, HAS_SCALE, HAS_ROW
            )
    _write(
        out, tl.sum(gate, 1), tl.sum(up, 1), tl.load(weights + slot).to(tl.float32), gate_bias, up_bias, expert, slot,
        row, rows, out_stride, alpha, limit, offset, row < rows, ACT, HAS_GATE, HAS_LIMIT, HAS_BIAS, OUT_PARTS,
        OUT_KIND,
    )  # fmt: skip


@triton.jit
def _spread(groups, PER: tl.constexpr):
    """[n, g] -> [n, g PER]: for each word what its group has."""
    n: tl.constexpr = groups.shape[0]
    g: tl.constexpr = groups.shape[1]
    return tl.reshape(tl.broadcast_to(groups[:, :, None], [n, g, PER]), [n, g * PER])


@triton.jit
def _matrix(
    codes, scale, row_scale, zero, here, stored, expert, row, group, rows, groups, scale_rows,
    SCALE: tl.constexpr, PER: tl.constexpr, TILE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ROW: tl.constexpr,
    HAS_ZERO: tl.constexpr,
):  # fmt: skip
    """Words `here` of a matrix, zero points and scales, [n, words of the groups] each."""
    factor = _factor(scale, row_scale, expert, row, group, rows, groups, scale_rows, SCALE, TILE, HAS_SCALE, HAS_ROW)
    less = _less(zero, expert, row, group, rows, groups, HAS_ZERO, not HAS_SCALE)
    if HAS_ZERO:
        less = _spread(less, PER)
    return tl.load(codes + here, mask=stored, other=0), less, _spread(factor, PER)


@triton.jit
def _dot(values, factor, x, sums):
    """values [n, k] * factor [n, k], times x [k, m], added to sums [n, m].

    Weights are rounded to bfloat16, as they are where they are dense."""
    weight = rounded(values * factor)
    if INTERPRETED:  # whose products of bfloat16 are wrong
        return tl.dot(weight.to(tl.float32), x.to(tl.float32), sums)
    else:
        return tl.dot(weight, x, sums)


@triton.jit
def _together(
    out, x, ids, weights, gate_codes, gate_scale, gate_row, gate_zero, gate_bias, up_codes, up_scale, up_row, up_zero,
    up_bias, table, slots, per_token, rows, words, groups, scale_rows, out_stride, alpha, limit, offset,
    BITS: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr, SCALE: tl.constexpr, PER: tl.constexpr,
    TILE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ROW: tl.constexpr, HAS_ZERO: tl.constexpr,
    ACT: tl.constexpr, HAS_GATE: tl.constexpr, HAS_LIMIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    OUT_PARTS: tl.constexpr, OUT_KIND: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """N rows of an expert for all of its slots, in the program of the first of these."""
    own = tl.program_id(0)
    expert = tl.load(ids + own).to(tl.int64)
    every = tl.arange(0, SLOTS)
    mine = (tl.load(ids + every, mask=every < slots, other=-1) == expert).to(tl.int32)
    before = tl.sum(tl.where(every < own, mine, 0), 0)
    if (expert < 0) | (before > 0):
        return
    PARTS: tl.constexpr = 32 // BITS
    count = tl.sum(mine, 0)
    rank = tl.where(mine > 0, tl.cumsum(mine, 0) - 1, -1)
    row = tl.program_id(1) * N + tl.arange(0, N)
    for done in range(0, count, TOKENS):
        index = done + tl.arange(0, TOKENS)
        slot = tl.sum(tl.where(rank[None, :] == index[:, None], every[None, :], 0), 1)
        valid = index < count
        start = x + ((slot // per_token) * PARTS * words)[None, :]
        gate = tl.zeros([N, TOKENS], tl.float32)
        up = tl.zeros([N, TOKENS], tl.float32)
        for first in range(0, groups, G):
            group = first + tl.arange(0, G)
            word = first * PER + tl.arange(0, G * PER)
            inside = valid[None, :] & (word < words)[:, None]
            here = (expert * rows + row[:, None]) * words + word[None, :]
            stored = (row < rows)[:, None] & (word < words)[None, :]
            up_words, up_less, up_factor = _matrix(
                up_codes, up_scale, up_row, up_zero, here, stored, expert, row, group, rows, groups, scale_rows, SCALE,
                PER, TILE, HAS_SCALE, HAS_ROW, HAS_ZERO,
            )  # fmt: skip
            if HAS_GATE:
                gate_words, gate_less, gate_factor = _matrix(
                    gate_codes, gate_scale, gate_row, gate_zero, here, stored, expert, row, group, rows, groups,
                    scale_rows, SCALE, PER, TILE, HAS_SCALE, HAS_ROW, HAS_ZERO,
                )  # fmt: skip
            for part in tl.static_range(PARTS):
                inputs = tl.load(start + part * words + word[:, None], mask=inside, other=0)
                values = _part(up_words, up_less, table, part, BITS, KIND, MIDDLE)
                up = _dot(values, up_factor, inputs, up)
                if HAS_GATE:
                    values = _part(gate_words, gate_less, table, part, BITS, KIND, MIDDLE)
                    gate = _dot(values, gate_factor, inputs, gate)
        weight = tl.load(weights + slot, mask=valid, other=0).to(tl.float32)[None, :]
        there = (row < rows)[:, None] & valid[None, :]
        _write(
            out, gate, up, weight, gate_bias, up_bias, expert, slot[None, :], row[:, None], rows, out_stride, alpha,
            limit, offset, there, ACT, HAS_GATE, HAS_LIMIT, HAS_BIAS, OUT_PARTS, OUT_KIND,
        )  # fmt: skip


def takes(matrices: dict[str, Matrices]) -> bool:
    """Whether there are kernels for such matrices: whole words of codes, and one scale for a group."""
    return all(
        part.spec.encoding.record is None and part.codes.shape[2] * part.codes.element_size() % 4 == 0
        for part in matrices.values()
    )


def forward(
    x: Tensor, ids: Tensor, weights: Tensor, matrices: dict[str, Matrices], biases: dict[str, Tensor],
    activation: Activation,
) -> Tensor:  # fmt: skip
    """x [T,H], ids [T,K] (-1: none), weights [T,K] -> [T,H] in x's dtype."""
    per_token = ids.shape[1]
    ids, weights = ids.contiguous(), weights.contiguous()
    gate, up, down = matrices.get("gate"), matrices["up"], matrices["down"]
    inputs = _empty_planes(len(x), up)
    _planes[(len(x), triton.cdiv(x.shape[1], 1024))](
        inputs, x.contiguous(), x.shape[1], inputs.shape[1], PARTS=_parts_of(up), KIND=kind_of_codes(up.spec), C=1024
    )
    hidden = _empty_planes(ids.numel(), down)
    _launch(
        hidden, inputs, ids, weights, per_token, gate, up, biases.get("gate"), biases.get("up"), activation,
        _parts_of(down), kind_of_codes(down.spec),
    )  # fmt: skip
    rows = x.new_empty(ids.numel(), down.codes.shape[1], dtype=torch.float32)
    _launch(rows, hidden, ids, weights, 1, None, down, None, biases.get("down"), None, 1, NUMBER.value)
    return combine(rows, ids, x.dtype, own=True)


def _launch(
    out: Tensor, x: Tensor, ids: Tensor, weights: Tensor, per_token: int, gate: Matrices | None, up: Matrices,
    gate_bias: Tensor | None, up_bias: Tensor | None, activation: Activation | None, out_parts: int, out_kind: int,
) -> None:  # fmt: skip
    slots, rows, spec, scale = ids.numel(), up.codes.shape[1], up.spec, up.scale
    group, parts = spec.scale_columns or GROUP, _parts_of(up)
    single = slots <= SINGLE_SLOTS
    kernel, (height, step, warps) = (_single, SINGLE) if single else (_together, TOGETHER)
    given = activation or Activation()
    kernel[(slots, triton.cdiv(rows, height))](
        out, x, ids, weights, *_tensors(gate), gate_bias, *_tensors(up), up_bias, table_of(spec, x.device),
        slots, per_token, rows, x.shape[1] // parts, triton.cdiv(up.cols, group),
        1 if scale is None else scale.shape[1], out.shape[1], given.alpha, given.limit, given.up_offset,
        BITS=32 // parts, KIND=kind_of_codes(spec), MIDDLE=middle_of(spec),
        SCALE=0 if scale is None else kind_of_scales(scale), PER=group // parts, TILE=spec.encoding.tile_rows,
        HAS_SCALE=scale is not None, HAS_ROW=up.row_scale is not None, HAS_ZERO=up.zero is not None,
        ACT=-1 if activation is None else activation.native()[0], HAS_GATE=gate is not None,
        HAS_LIMIT=given.limit > 0, HAS_BIAS=up_bias is not None, OUT_PARTS=out_parts, OUT_KIND=out_kind,
        SLOTS=1 if single else triton.next_power_of_2(slots), N=height, G=max(1, step * parts // group),
        num_warps=warps,
    )  # fmt: skip


def _parts_of(matrices: Matrices) -> int:
    """Codes in a word."""
    return 32 // {4: 4, 16: 16}.get(matrices.spec.encoding.bits, 8)


def _empty_planes(count: int, matrices: Matrices) -> Tensor:
    """For the inputs of matrices, bfloat16 [count, columns]."""
    codes = matrices.codes
    words = codes.shape[2] * codes.element_size() // 4
    return torch.empty(count, words * _parts_of(matrices), dtype=torch.bfloat16, device=codes.device)


def _tensors(matrices: Matrices | None) -> tuple[Any, ...]:
    if matrices is None:
        return (None,) * 4
    return matrices.codes.view(torch.int32), as_bytes(matrices.scale), matrices.row_scale, matrices.zero
