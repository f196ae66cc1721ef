"""LoRA beside weights that are multiplied together: as more columns of theirs, so that one product computes both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.gpu.products import ALIGNED


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

    def weights(self, factors: Sequence[Tensor], experts: Tensor | None) -> tuple[Tensor, Tensor]:
        """(a [m, R, cols], b [m, rows, R]) of some experts, None: of all, bfloat16; b is scaled."""
        own = {
            i: factors[i] if experts is None else factors[i].index_select(0, experts)
            for part in self.parts
            for i in (2 * part.index, 2 * part.index + 1)
        }
        first = own[2 * self.parts[0].index]
        a = first.new_zeros(len(first), self.rank, first.shape[2], dtype=torch.bfloat16)
        b = first.new_zeros(len(first), self.rows, self.rank, dtype=torch.bfloat16)
        for part in self.parts:
            a[:, part.ranks] = own[2 * part.index]
            b[:, part.rows, part.ranks] = own[2 * part.index + 1] * part.scaling
        return a, b

    def write_gradients(
        self,
        grads: Sequence[Tensor | None],
        experts: Tensor | None,
        of_a: Callable[[], Tensor],
        of_b: Callable[[], Tensor],
    ) -> None:
        """Writes those of A and B of some experts, None: of all. of_a, of_b: give [m, R, cols] and [m, rows, R]."""
        for which, found in ((0, of_a), (1, of_b)):
            wanted = [(part, grads[2 * part.index + which]) for part in self.parts]
            if all(to is None for _, to in wanted):
                continue
            values = found()
            for part, to in wanted:
                if to is None:
                    continue
                own = values[:, part.rows, part.ranks] * part.scaling if which else values[:, part.ranks]
                to[slice(None) if experts is None else experts] = own.to(to.dtype)
