"""Products of rows that are sorted by expert: torch's grouped ones, and a loop where it has none."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.gpu import fast

ALIGNED = 8  # bfloat16 values: torch's products take rows of multiples of 16 bytes


def product(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """x [rows, k] @ weights[e] [n, k, m] -> [rows, m], bfloat16; rows of expert e end before ends[e], int32 [n]."""
    if _has_grouped(x.shape[1], weights.shape[2]):
        return F.grouped_mm(x, weights, offs=ends)
    parts = [x[start:end] @ weights[e] for e, (start, end) in enumerate(_spans(ends))]
    return torch.cat(parts) if parts else x.new_zeros(0, weights.shape[2])


def gram(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """For each expert a^T b over its rows: [rows, m], [rows, k] -> [n, m, k], bfloat16; zeros where it has no rows."""
    if not _has_grouped(a.shape[1], b.shape[1]):
        return torch.stack([a[start:end].T @ b[start:end] for start, end in _spans(ends)])
    found = F.grouped_mm(a.T, b, offs=ends)
    empty = ends.diff(prepend=ends.new_zeros(1)) == 0
    return found.masked_fill_(empty[:, None, None], 0)


def gathered_gram(a: Tensor, tokens: Tensor, index: Tensor, ends: Tensor) -> Tensor:
    """`gram` of a [rows, m] and of the first columns k of tokens[index], which are not laid side by side: [n, m, k].

    k: those columns of tokens that are not the m last.
    """
    cols = tokens.shape[1] - a.shape[1]
    if fast.usable(a.device):
        from coterie.gpu.kernels.gram import gathered_gram

        return gathered_gram(a, tokens, index, ends, cols)
    return gram(a, tokens.index_select(0, index)[:, :cols], ends)


def _has_grouped(*sizes: int) -> bool:
    return hasattr(F, "grouped_mm") and not any(size % ALIGNED for size in sizes)


def _spans(ends: Tensor) -> list[tuple[int, int]]:
    bounds = [0, *ends.tolist()]
    return list(itertools.pairwise(bounds))
