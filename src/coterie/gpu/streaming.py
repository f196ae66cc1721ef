"""Experts in RAM for many tokens on a device: their packed bytes are sent there in pieces, and computed there.

Forward and backward are those of experts that are on the device (resident.py), and each sends them. On the device there
are, beside what the tokens need, two pieces of packed experts, one of their codes, as large, and one that is dense.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from coterie import ops
from coterie.errors import ArgumentError
from coterie.gpu import delivery, offload, resident
from coterie.gpu.matrices import Matrices
from coterie.gpu.rates import Layer, Rates, measured
from coterie.gpu.resident import Resident
from coterie.gpu.routing import Piece, Routing, route
from coterie.lora import ExpertLora

if TYPE_CHECKING:
    from coterie.experts import Experts


@dataclass(frozen=True, slots=True)
class Streaming:
    """Which calls experts are sent to the device of the tokens for.

    from_tokens: those of so many tokens or more; None: those that `rates` say are faster so, None: measured ones.
    """

    from_tokens: int | None = None
    rates: Rates | None = None

    def chosen(self, experts: Experts, tokens: int, per_token: int, device: torch.device) -> bool:
        """Whether a call of so many tokens, with so many experts each, is computed on the device."""
        if self.from_tokens is not None:
            return tokens >= self.from_tokens
        if not tokens or not per_token:
            return False
        layer = Layer(experts.num_experts, experts.expert_nbytes, _weights(experts))
        return (self.rates or measured(device)).streams(tokens, per_token, layer, experts.uses_int8())


@torch.compiler.disable
def forward(
    experts: Experts, streaming: Streaming, x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None
) -> Tensor:
    """See Experts.__call__: the tokens are on a device, and go to the experts, or the experts to them."""
    ops.check_batch(experts, x, ids, weights, x.device)
    given = lora is not None and any(factor is not None for factor in lora.factors())
    if given or (torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)):
        experts.adapt()  # before the way is chosen: what checkpointing computes again goes the same one
    if not streaming.chosen(experts, *ids.shape, x.device):
        return offload.forward(experts, x, ids, weights, lora)
    return compute(experts, x, ids, weights, lora)


def compute(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None) -> Tensor:
    """The experts' output, computed on the device that x, ids and weights are on. LoRA's factors are copied there.

    It waits for the device once, for which experts have tokens. Raises ArgumentError for ids out of range.
    """
    device, lora = x.device, lora or ExpertLora()
    lora.check(experts)
    pairs = {
        name: (a.to(device), b.to(device), scaling)
        for (name, (a, b)), scaling in zip(lora.pairs().items(), lora.scalings(), strict=True)
        if a is not None and b is not None
    }
    _check_range(ids, experts.num_experts)
    biases = {name: bias.to(device) for name, bias in experts.biases().items()}
    return Streamed(device, {}, biases, experts.activation, experts).forward(x, ids.long(), weights, pairs)


@dataclass(frozen=True, slots=True)
class Streamed(Resident):
    """All experts of a layer, of which the matrices of one piece are on the device while the pieces are gone through.

    experts: them, in RAM.
    """

    experts: Experts

    @property
    def count(self) -> int:
        return self.experts.num_experts

    @property
    def first(self) -> tuple[str, ...]:
        return self.experts.projections[:-1]

    def height(self, name: str) -> int:
        return self.experts.shape(name)[0]

    def multiplies_codes(self, slots: int) -> bool:
        return False

    def route(self, ids: Tensor) -> Routing:
        """Its pieces are those whose turn it is: going through them sends experts, and again each time."""
        most = min(resident.piece_nbytes(self.device) // (2 * _weights(self.experts)), self._staged())
        found = route(ids, self.count, max(1, most), named=True)
        return Routing(found.order, found.place, found.tokens, _Arriving(self, tuple(found.pieces)))

    def dense(self, names: Sequence[str], experts: Tensor, *options: Any, **more: Any) -> Tensor:
        """Of all the experts of the piece that is there."""
        return Resident.dense(self, names, torch.arange(len(experts), device=self.device), *options, **more)

    def _staged(self) -> int:
        return delivery.STAGED_NBYTES // self.experts.expert_nbytes


@dataclass(frozen=True, slots=True)
class _Arriving:
    """Pieces, each with its matrices on the device until the next is asked for."""

    streamed: Streamed
    pieces: Sequence[Piece]

    def __iter__(self) -> Iterator[Piece]:
        experts, matrices = self.streamed.experts, self.streamed.matrices
        packed = [[experts.packed(e) for e in piece.numbers] for piece in self.pieces]
        arriving = delivery.deliver(self.streamed.device, packed, self._unpacked)
        with contextlib.closing(arriving):
            for piece in self.pieces:
                matrices.update(next(arriving))
                try:
                    yield piece
                finally:
                    matrices.clear()

    def _unpacked(self, data: Tensor) -> dict[str, Matrices]:
        return self.streamed.experts.unpacked(lambda part: data[:, part])


def _weights(experts: Experts) -> int:
    """Of one expert."""
    return sum(rows * cols for rows, cols in map(experts.shape, experts.projections))


def _check_range(ids: Tensor, count: int) -> None:
    """Raises ArgumentError for ids that are neither an expert's nor -1."""
    if not ids.numel():
        return
    low, high = torch.stack(ids.aminmax()).to("cpu").tolist()
    if low < -1 or high >= count:
        found = low if low < -1 else high
        raise ArgumentError(f"ids: expected experts 0..{count - 1}, or -1 for none, found {found}")
