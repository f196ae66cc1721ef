"""LoRA beside weights that are multiplied together: as more columns of theirs, so that one product computes both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.gpu.products import ALIGNED, gram


@dataclass(frozen=True, slots=True)
class Part:
    """LoRA of one of the matrices: the number of its A and B, its rows, its place among the ranks, and its scaling."""

    index: int
    rows: slice
    ranks: slice
    scaling: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA of matrices one below the other, for all experts: W + b a stands for W, where `parts` say how.

    rank: R, of all parts, each filled up with zeros to what products take.
    """

    parts: tuple[Part, ...] = ()
    rank: int = 0
    rows: int = 0

    @classmethod
    def of(cls, matrices: Sequence[tuple[int | None, float, int]], factors: Sequence[Tensor]) -> Adapter:
        """matrices: of each the number of its A and B, or None, the scaling, and how many rows it has."""
        parts, rank, start = [], 0, 0
        for index, scaling, height in matrices:
            if index is not None:
                own = factors[2 * index].shape[1]
                parts.append(Part(index, slice(start, start + height), slice(rank, rank + own), scaling))
                rank += -(-own // ALIGNED) * ALIGNED
            start += height
        return cls(tuple(parts), rank, start)

    def weights(self, factors: Sequence[Tensor], experts: Tensor) -> tuple[Tensor, Tensor]:
        """(a [m, R, cols], b [m, rows, R]) of some experts, bfloat16; b is scaled."""
        first = factors[2 * self.parts[0].index]
        a = first.new_zeros(len(experts), self.rank, first.shape[2], dtype=torch.bfloat16)
        b = first.new_zeros(len(experts), self.rows, self.rank, dtype=torch.bfloat16)
        for part in self.parts:
            a[:, part.ranks] = factors[2 * part.index].index_select(0, experts)
            b[:, part.rows, part.ranks] = factors[2 * part.index + 1].index_select(0, experts) * part.scaling
        return a, b

    def write_gradients(
        self, grads: Sequence[Tensor | None], experts: Tensor, ends: Tensor, rows: Tensor, low: Tensor, grad: Tensor,
        low_grad: Tensor,
    ) -> None:  # fmt: skip
        """Those of A and B of some experts, from their rows [n, cols], what a makes of them, low [n, R], and from the
        gradients of the output [n, rows], and of `low`."""
        wanted = [[grads[2 * part.index + which] for part in self.parts] for which in (0, 1)]
        if any(to is not None for to in wanted[0]):
            found = gram(low_grad, rows, ends)
            for part, to in zip(self.parts, wanted[0], strict=True):
                if to is not None:
                    to[experts] = found[:, part.ranks].to(to.dtype)
        if any(to is not None for to in wanted[1]):
            found = gram(grad, low, ends)
            for part, to in zip(self.parts, wanted[1], strict=True):
                if to is not None:
                    to[experts] = found[:, part.rows, part.ranks].to(to.dtype) * part.scaling
