"""Experts of a layer that are on a device, packed, and their forward and backward there.

A piece of them at a time is dequantised to bfloat16, in the forward and again in the backward: beside the packed
experts and what the tokens need, memory holds one dense piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from coterie.activations import Activation
from coterie.gpu.activate import activate
from coterie.gpu.matrices import Matrices
from coterie.gpu.products import ALIGNED, gram, product
from coterie.gpu.routing import Piece, Routing, route

PIECE_NBYTES = 1 << 29  # of dense bfloat16 weights
FIRST = ("gate", "up")  # the projections before the activation

Pair = tuple[Tensor, Tensor, float]  # LoRA's A [n, R, cols] and B [n, rows, R], and its scaling


@dataclass(frozen=True, slots=True)
class Resident:
    """n experts of hidden size H and intermediate size I on `device`.

    matrices, biases (float32 [n, rows]): by projection, gate only where there is one.
    """

    device: torch.device
    matrices: dict[str, Matrices]
    biases: dict[str, Tensor]
    activation: Activation

    @property
    def count(self) -> int:
        return self.matrices["up"].codes.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        biases = sum(bias.nbytes for bias in self.biases.values())
        return biases + sum(matrices.nbytes for matrices in self.matrices.values())

    @property
    def first(self) -> tuple[str, ...]:
        return tuple(name for name in FIRST if name in self.matrices)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Pair] | None = None) -> Tensor:
        """x [T,H], ids int64 [T,K] (-1: none here), weights [T,K] -> [T,H] in x's dtype; all on the device.

        Differentiable in x, weights and LoRA's A and B, which are this Resident's n experts' and on the device.
        """
        lora = lora or {}
        names = tuple(lora)
        factors = [factor for a, b, _ in lora.values() for factor in (a, b)]
        scalings = tuple(scaling for _, _, scaling in lora.values())
        with torch.autocast(self.device.type, enabled=False):
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weights, *factors)):
                return _Compute.apply(self, names, scalings, x, ids, weights, *factors)
            return _Call(self, names, scalings, x, ids, weights, factors).output()

    def route(self, ids: Tensor) -> Routing:
        rows, cols = self.matrices["up"].codes.shape[1], self.matrices["up"].cols
        expert = 2 * rows * cols * len(self.matrices)
        return route(ids, self.count, max(1, PIECE_NBYTES // expert))

    def dense(self, names: Sequence[str], experts: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """[m, rows, cols] of some experts, bfloat16 or float32; projections one below the other."""
        heights = [self.matrices[name].codes.shape[1] for name in names]
        cols = self.matrices[names[0]].cols
        out = torch.empty(len(experts), sum(heights), cols, dtype=dtype, device=self.device)
        for name, part in zip(names, out.split(heights, 1), strict=True):
            self.matrices[name].dense(experts, part)
        return out


class _Compute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        resident: Resident,
        names: tuple[str, ...],
        scalings: tuple[float, ...],
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        *factors: Tensor,
    ) -> Tensor:
        kept: list[Tensor] = []
        out = _Call(resident, names, scalings, x, ids, weights, factors).output(kept)
        ctx.resident, ctx.names, ctx.scalings, ctx.count = resident, names, scalings, len(factors)
        ctx.save_for_backward(x, ids, weights, *factors, *kept)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (6 + ctx.count)
        x, ids, weights, *rest = ctx.saved_tensors
        factors, kept = rest[: ctx.count], rest[ctx.count :]
        call = _Call(ctx.resident, ctx.names, ctx.scalings, x, ids, weights, factors)
        wanted = ctx.needs_input_grad
        grads = [torch.zeros_like(f) if want else None for f, want in zip(factors, wanted[6:], strict=True)]
        grad_x, grad_weights = call.gradients(grad, kept, wanted[3], grads)
        return None, None, None, grad_x, None, grad_weights.to(weights.dtype), *grads


def _with_zeros(tokens: Tensor) -> Tensor:
    """[T, H] -> bfloat16 [T + 1, H]: the last row stands for slots without an expert."""
    return F.pad(tokens.to(torch.bfloat16), (0, 0, 0, 1))


class _Call:
    """One call: the batch, sorted, and what is done with a piece of the experts."""

    def __init__(
        self,
        resident: Resident,
        names: Sequence[str],
        scalings: Sequence[float],
        x: Tensor,
        ids: Tensor,
        weights: Tensor,
        factors: Sequence[Tensor],
    ) -> None:
        self.resident, self.routing, self.shape, self.dtype = resident, resident.route(ids), ids.shape, x.dtype
        self.x = _with_zeros(x)
        weights = weights.flatten()[self.routing.order].float()
        self.weights = torch.where(self.routing.tokens < len(x), weights, 0)[:, None]
        self.lora = {name: (i, scaling) for i, (name, scaling) in enumerate(zip(names, scalings, strict=True))}
        self.factors = factors

    def output(self, kept: list[Tensor] | None = None) -> Tensor:
        """The output [T,H]; what stands before the activation, by piece, is added to `kept`."""
        slots = self.x.new_zeros(self.shape.numel(), self.x.shape[1])
        for piece in self.routing.pieces:
            before = self.first(piece)
            hidden = self.weighted(piece, self.activated(before))
            slots.index_copy_(0, self.routing.order[piece.rows], self.second(piece, hidden))
            if kept is not None:
                kept.append(before)
        return self._summed(slots)

    def gradients(
        self, grad: Tensor, kept: Sequence[Tensor], wanted: bool, grads: list[Tensor | None]
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of x, where it is wanted, and of the weights, float32, from that of the output [T,H].

        Those of A and B are written to `grads`, in the order of the factors.
        """
        slots = self.x.new_zeros(self.shape.numel(), self.x.shape[1]) if wanted else None
        grad = _with_zeros(grad)
        grad_weights = torch.zeros(self.shape.numel(), dtype=torch.float32, device=self.x.device)
        for piece, before in zip(self.routing.pieces, kept, strict=True):
            grad_rows = self.rows(piece, grad)
            with torch.enable_grad():
                leaf = before.detach().requires_grad_()
                hidden = self.activated(leaf)
            back = self.back_second(piece, grad_rows, hidden.detach(), grads)
            found = (back * hidden.detach()).sum(1, dtype=torch.float32)
            if "down" in self.resident.biases:
                found += (grad_rows * self.bias(piece, "down")).sum(1)
            order = self.routing.order[piece.rows]
            grad_weights[order] = found
            (slope,) = torch.autograd.grad(hidden, leaf, self.weighted(piece, back))
            back_rows = self.back_first(piece, slope, grads, wanted)
            if slots is not None and back_rows is not None:
                slots.index_copy_(0, order, back_rows)
        return None if slots is None else self._summed(slots), grad_weights.view(self.shape)

    def rows(self, piece: Piece, tokens: Tensor) -> Tensor:
        """The piece's rows of tokens [T + 1, H]."""
        return tokens.index_select(0, self.routing.tokens[piece.rows])

    def first(self, piece: Piece) -> Tensor:
        """What stands before the activation: gate and up side by side, bfloat16 [rows, 2 I]."""
        names, rows = self.resident.first, self.rows(piece, self.x)
        y = product(rows, self.resident.dense(names, piece.experts).mT, piece.ends)
        for name, part in zip(names, y.chunk(len(names), 1), strict=True):
            self._adapt(piece, name, rows, part)
            if name in self.resident.biases:
                part += self.bias(piece, name)
        return y

    def activated(self, before: Tensor) -> Tensor:
        gate, up = before.chunk(2, 1) if "gate" in self.resident.matrices else (None, before)
        return activate(self.resident.activation, gate, up)

    def weighted(self, piece: Piece, rows: Tensor) -> Tensor:
        """Rows times their routing weights, bfloat16."""
        return (rows * self.weights[piece.rows]).to(torch.bfloat16)

    def second(self, piece: Piece, hidden: Tensor) -> Tensor:
        """hidden [rows, I], weighted -> [rows, H]."""
        y = product(hidden, self.resident.dense(("down",), piece.experts).mT, piece.ends)
        self._adapt(piece, "down", hidden, y)
        if "down" in self.resident.biases:
            y += self.weighted(piece, self.bias(piece, "down"))
        return y

    def back_second(self, piece: Piece, grad: Tensor, hidden: Tensor, grads: list[Tensor | None]) -> Tensor:
        """The gradient of the weighted hidden values, from that of the output of each row."""
        back = product(grad, self.resident.dense(("down",), piece.experts), piece.ends)
        if "down" in self.lora:
            self._back_adapt(piece, "down", self.weighted(piece, hidden), grad, back, grads)
        return back

    def back_first(self, piece: Piece, slope: Tensor, grads: list[Tensor | None], wanted: bool) -> Tensor | None:
        """The gradient of the rows, where it is wanted, from that of what stands before the activation."""
        names = self.resident.first
        back = product(slope, self.resident.dense(names, piece.experts), piece.ends) if wanted else None
        rows = self.rows(piece, self.x) if any(name in self.lora for name in names) else None
        for name, part in zip(names, slope.chunk(len(names), 1), strict=True):
            if name in self.lora and rows is not None:
                self._back_adapt(piece, name, rows, part, back, grads)
        return back

    def bias(self, piece: Piece, name: str) -> Tensor:
        """Float32 [rows, ...]."""
        row = torch.arange(piece.rows.stop - piece.rows.start, dtype=torch.int32, device=self.x.device)
        return self.resident.biases[name][piece.experts[torch.searchsorted(piece.ends, row, right=True)]]

    def _summed(self, slots: Tensor) -> Tensor:
        """The sum of each token's slots [T*K, H], in a fixed order."""
        return slots.view(*self.shape, slots.shape[1]).sum(1, dtype=torch.float32).to(self.dtype)

    def _pair(self, piece: Piece, name: str) -> Pair:
        """A and B of the piece's experts, bfloat16, the rank filled up with zeros to what products take."""
        i, scaling = self.lora[name]
        a, b = (factor.index_select(0, piece.experts).to(torch.bfloat16) for factor in self.factors[2 * i : 2 * i + 2])
        missing = -a.shape[1] % ALIGNED
        if missing:
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        return a, b, scaling

    def _adapt(self, piece: Piece, name: str, rows: Tensor, out: Tensor) -> None:
        """Adds what LoRA makes of the rows to `out`."""
        if name in self.lora:
            a, b, scaling = self._pair(piece, name)
            out += product(product(rows, a.mT, piece.ends).mul_(scaling), b.mT, piece.ends)

    def _back_adapt(
        self, piece: Piece, name: str, rows: Tensor, grad: Tensor, back: Tensor | None, grads: list[Tensor | None]
    ) -> None:
        """LoRA's part of the gradient of its input `rows`, added to `back`, and the gradients of A and B."""
        a, b, scaling = self._pair(piece, name)
        low = product(grad, b, piece.ends).mul_(scaling)
        if back is not None:
            back += product(low, a, piece.ends)
        i, rank = self.lora[name][0], self.factors[2 * self.lora[name][0]].shape[1]
        grad_a, grad_b = grads[2 * i : 2 * i + 2]
        if grad_a is not None:
            grad_a[piece.experts] = gram(low, rows, piece.ends)[:, :rank].to(grad_a.dtype)
        if grad_b is not None:
            high = product(rows, a.mT, piece.ends).mul_(scaling)
            grad_b[piece.experts] = gram(grad, high, piece.ends)[..., :rank].to(grad_b.dtype)
