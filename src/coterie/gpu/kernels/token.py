"""What a decoded token needs of a GPU beside products: norms, the choice of experts, attention to a cache.

Each is one launch, attention two; by torch's operators they are five to ten.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.gpu.kernels.decode import INTERPRETED, as_output, rounded

FLOATS = torch.bfloat16, torch.float32
KEYS = 64  # positions of a step of attention
PART = 256  # positions of a program of attention, where there are not more than
MOST_PARTS = 64  # parts of a sequence
LEAST_ROWS = 16  # of a product
NO_SCORE = tl.constexpr(-1.0e30)


@triton.jit
def _rms_norm(out, x, weight, cols, epsilon, ROUNDED: tl.constexpr, FROM_ONE: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, C)
    there = column < cols
    values = tl.load(x + row * cols + column, mask=there, other=0).to(tl.float32)
    values = values * (1.0 / tl.sqrt(tl.sum(values * values, 0) / cols + epsilon))
    if ROUNDED:
        values = as_output(values, out).to(tl.float32)
    scale = tl.load(weight + column, mask=there, other=0).to(tl.float32)
    if FROM_ONE:
        scale += 1.0
    tl.store(out + row * cols + column, as_output(values * scale, out), mask=there)


@triton.jit
def _choose(
    weights, ids, logits, experts, TOP_K: tl.constexpr, NORMALISED: tl.constexpr, E: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert, place = tl.arange(0, E), tl.arange(0, K)
    score = tl.load(logits + row * experts + expert, mask=expert < experts, other=float("-inf")).to(tl.float32)
    score = tl.exp(score - tl.max(score, 0))
    score = tl.where(expert < experts, score, -1.0)
    total = tl.sum(tl.where(expert < experts, score, 0.0), 0)
    found = tl.zeros([K], tl.float32)
    chosen = tl.zeros([K], tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.max(score, 0)
        which = tl.minimum(tl.min(tl.where(score == best, expert, E), 0), experts - 1)  # none equals a NaN
        found = tl.where(place == k, best, found)
        chosen = tl.where(place == k, which, chosen)
        score = tl.where(expert == which, -1.0, score)
    if NORMALISED:
        total = tl.sum(found, 0) + 0.0 * total  # which is NaN where a score is
    there = place < TOP_K
    tl.store(weights + row * TOP_K + place, as_output(found / total, weights), mask=there)
    tl.store(ids + row * TOP_K + place, chosen.to(tl.int64), mask=there)


@triton.jit
def _dot(a, b, sums):
    if INTERPRETED:  # whose products of bfloat16 are wrong
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    else:
        return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _attend(
    sums, largest, total, query, key, value, mask, scale, positions, part, shared, width, value_width,
    query_batch, query_head, key_batch, key_head, key_row, value_batch, value_head, value_row, mask_batch,
    GROUP: tl.constexpr, R: tl.constexpr, D: tl.constexpr, V: tl.constexpr, N: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """The query heads of one head of keys and values, of one sequence, over a part of its positions."""
    which, number, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    batch, head = (which // shared).to(tl.int64), (which % shared).to(tl.int64)
    row, column, value_column = tl.arange(0, R), tl.arange(0, D), tl.arange(0, V)
    own = (head * GROUP + row)[:, None]
    q = tl.load(
        query + batch * query_batch + own * query_head + column[None, :],
        mask=(row < GROUP)[:, None] & (column < width)[None, :], other=0,
    )  # fmt: skip
    best = tl.full([R], NO_SCORE, tl.float32)
    weight = tl.zeros([R], tl.float32)
    acc = tl.zeros([R, V], tl.float32)
    keys, values = key + batch * key_batch + head * key_head, value + batch * value_batch + head * value_head
    for first in range(number * part, tl.minimum(number * part + part, positions), N):
        position = first + tl.arange(0, N)
        seen = position < positions
        if HAS_MASK:
            seen = seen & (tl.load(mask + batch * mask_batch + position, mask=seen, other=0) != 0)
        if tl.max(seen.to(tl.int32), 0) > 0:  # of a cache that is not full, the rest is not read
            at = position.to(tl.int64)
            k = tl.load(
                keys + at[None, :] * key_row + column[:, None],
                mask=seen[None, :] & (column < width)[:, None], other=0,
            )  # fmt: skip
            score = _dot(q, k, tl.zeros([R, N], tl.float32)) * scale
            score = tl.where(seen[None, :], score, NO_SCORE)
            higher = tl.maximum(best, tl.max(score, 1))
            less = tl.exp(best - higher)
            p = tl.where(seen[None, :], tl.exp(score - higher[:, None]), 0.0)
            v = tl.load(
                values + at[:, None] * value_row + value_column[None, :],
                mask=seen[:, None] & (value_column < value_width)[None, :], other=0,
            )  # fmt: skip
            probability = rounded(p) if v.dtype == tl.bfloat16 else p.to(v.dtype)
            acc = _dot(probability, v, acc * less[:, None])
            weight = weight * less + tl.sum(p, 1)
            best = higher
    to = (which * parts + number) * GROUP + row
    tl.store(largest + to, best, mask=row < GROUP)
    tl.store(total + to, weight, mask=row < GROUP)
    tl.store(
        sums + to[:, None] * value_width + value_column[None, :], acc,
        mask=(row < GROUP)[:, None] & (value_column < value_width)[None, :],
    )  # fmt: skip


@triton.jit
def _join(out, sums, largest, total, parts, value_width, GROUP: tl.constexpr, P: tl.constexpr, V: tl.constexpr):
    """The output of one query head, of what its parts found."""
    which, row = tl.program_id(0), tl.program_id(1)
    part, column = tl.arange(0, P), tl.arange(0, V)
    at = (which * parts + part) * GROUP + row
    best = tl.load(largest + at, mask=part < parts, other=NO_SCORE)
    share = tl.exp(best - tl.max(best, 0))
    weight = tl.sum(share * tl.load(total + at, mask=part < parts, other=0), 0)
    found = tl.load(
        sums + at[:, None] * value_width + column[None, :],
        mask=(part < parts)[:, None] & (column < value_width)[None, :], other=0,
    )  # fmt: skip
    value = tl.sum(found * share[:, None], 0) / tl.where(weight == 0, 1.0, weight)
    to = out + (which.to(tl.int64) * GROUP + row) * value_width + column
    tl.store(to, as_output(value, out), mask=column < value_width)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, rounded: bool, from_one: bool) -> Tensor | None:
    """See `_native.rms_norm`: x [..., cols], weight [cols]; None for what is not taken."""
    cols = x.shape[-1]
    if x.dtype not in FLOATS or weight.dtype != x.dtype or not x.is_contiguous() or not weight.is_contiguous():
        return None
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        _rms_norm[(x.numel() // cols,)](
            out, x, weight, cols, epsilon, ROUNDED=rounded, FROM_ONE=from_one, C=triton.next_power_of_2(cols),
        )  # fmt: skip
    return out


def choose(logits: Tensor, top_k: int, normalised: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of logits [T, E] the softmax's largest, weights [T, K] in `dtype` and experts int64 [T, K]; of equals the first.

    normalised: weights are divided by their sum.
    """
    tokens, experts = logits.shape
    weights = logits.new_empty(tokens, top_k, dtype=dtype)
    ids = logits.new_empty(tokens, top_k, dtype=torch.int64)
    with torch.cuda.device_of(logits):
        _choose[(tokens,)](
            weights, ids, logits.contiguous(), experts, TOP_K=top_k, NORMALISED=normalised,
            E=triton.next_power_of_2(experts), K=triton.next_power_of_2(top_k), num_warps=1 if experts <= 128 else 4,
        )  # fmt: skip
    return weights, ids


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
    """query [B, heads, 1, D], key [B, shared, S, D], value [B, shared, S, V], mask bool [B, 1, 1, S] or None
    -> [B, 1, heads, V]; None for others. A query that sees nothing is zero."""
    (batch, heads, tokens, width), shared, positions = query.shape, key.shape[1], key.shape[2]
    adjacent = all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    same = query.dtype == key.dtype == value.dtype and query.dtype in FLOATS
    if tokens != 1 or heads % shared or not adjacent or not same or not positions or batch > 1 << 12:
        return None
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape[1:] != (1, 1, positions) or mask.stride(-1) != 1:
            return None
        mask = mask.expand(batch, 1, 1, positions)
    group, value_width = heads // shared, value.shape[-1]
    part = max(PART, triton.cdiv(triton.cdiv(positions, MOST_PARTS), KEYS) * KEYS)
    parts = triton.cdiv(positions, part)
    sums = query.new_empty(batch * heads * parts, value_width, dtype=torch.float32)
    largest, total = query.new_empty(2, batch * heads * parts, dtype=torch.float32)
    out = query.new_empty(batch, 1, heads, value_width)
    rows, columns = max(LEAST_ROWS, triton.next_power_of_2(group)), triton.next_power_of_2(value_width)
    with torch.cuda.device_of(query):
        _attend[(batch * shared, parts)](
            sums, largest, total, query, key, value, None if mask is None else mask.view(torch.uint8), scale, positions,
            part, shared, width, value_width, query.stride(0), query.stride(1), *key.stride()[:3], *value.stride()[:3],
            0 if mask is None else mask.stride(0), GROUP=group, R=rows, D=max(16, triton.next_power_of_2(width)),
            V=max(16, columns), N=KEYS, HAS_MASK=mask is not None,
        )  # fmt: skip
        _join[(batch * shared, group)](
            out, sums, largest, total, parts, value_width, GROUP=group, P=triton.next_power_of_2(parts), V=columns,
        )  # fmt: skip
    return out
