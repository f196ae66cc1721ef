"""Slots of a batch, which are a token and one of its experts, sorted by expert, on the tokens' device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Some experts and their rows: `rows` of the sorted slots, those of expert `experts[i]` end before `ends[i]`.

    numbers: the experts in RAM, where the device was asked for them.
    """

    experts: Tensor | None  # int64 [n]; None: all there are, in their own order
    rows: slice
    ends: Tensor  # int32 [n], counted from the first of the rows
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Routing:
    """order: slots by expert, int64 [T*K]; those without an expert come last. place: where each slot is in this order,
    int64 [T*K]. tokens: the sorted slots' own, T where there is none.

    pieces: what is to be computed. Rows in none of them have no expert; some that have none may be in the last.
    """

    order: Tensor
    place: Tensor
    tokens: Tensor
    pieces: Iterable[Piece]


def route(ids: Tensor, count: int, most: int, named: bool = False) -> Routing:
    """ids int64 [T, K] from -1, no expert, to count - 1. Pieces are of at most `most` experts.

    One piece is laid out without waiting for the device; where there may be more, it is asked once. named: it is asked
    in any case, and pieces hold experts with rows alone, and have their `numbers`.
    """
    (batch, top_k), slots = ids.shape, ids.numel()
    ids = torch.where(ids < 0, count, ids).flatten()
    rows = torch.zeros(count + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, ids, torch.ones_like(ids))
    n = min(count, slots)
    if n == count <= most and not named:  # one piece of all experts, in their own order
        experts, rank = None, ids
    else:
        experts = (rows[:count] == 0).to(torch.int8).argsort(stable=True)[:n]  # those with rows are the first
        rank = torch.full_like(rows, n).scatter_(0, experts, torch.arange(n, device=ids.device))[ids]
    order = rank.to(torch.int16 if count < 1 << 15 else torch.int64).argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(slots, device=ids.device))
    tokens = torch.where(ids[order] < count, order // max(1, top_k), batch)
    ends = (rows[:count] if experts is None else rows[experts]).cumsum(0).int()
    if n <= most and not named:
        ends[-1:] = slots  # rows without an expert are the last one's
        return Routing(order, place, tokens, (Piece(experts, slice(0, slots), ends),) if slots else ())
    numbers, bounds = torch.stack([experts, ends.long()]).to("cpu").tolist()
    bounds = [0, *bounds]
    used = sum(start < end for start, end in itertools.pairwise(bounds))
    pieces = []
    for first in range(0, used, most):
        last = min(first + most, used)
        span = slice(bounds[first], bounds[last])
        own = tuple(numbers[first:last])
        pieces.append(Piece(experts[first:last], span, ends[first:last] - span.start, own))
    return Routing(order, place, tokens, tuple(pieces))
