"""Experts of a layer that are on a device, packed, and their forward and backward there.

A piece of them at a time is dequantised to bfloat16, in the forward and again in the backward: beside the packed
experts and what the tokens need, memory holds one dense piece.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from coterie.activations import Activation
from coterie.gpu import fast
from coterie.gpu.adapters import Adapter
from coterie.gpu.matrices import Matrices
from coterie.gpu.products import gathered_gram, gram, product
from coterie.gpu.routing import Piece, Routing, route
from coterie.gpu.rows import activated, combined, slope

PIECE_NBYTES = 1 << 29  # of dense bfloat16 weights, at least; and of a device's memory:
PIECE_SHARE = 1 / 48
FEW_SLOTS = 1024  # up to which codes are multiplied as they are packed
KEPT = 3  # tensors of a piece, from the forward to the backward
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
            if not lora and self.multiplies_codes(ids.numel()):
                from coterie.gpu.kernels import few

                return few.forward(x, ids, weights, self.matrices, self.biases, self.activation)
            return _Call(self, names, scalings, x, ids, weights, factors).output()

    def height(self, name: str) -> int:
        """Rows of a projection."""
        return self.matrices[name].codes.shape[1]

    def multiplies_codes(self, slots: int) -> bool:
        """Whether so many slots are multiplied with codes as they are packed."""
        if not 0 < slots <= FEW_SLOTS or not fast.usable(self.device):
            return False
        from coterie.gpu.kernels import few

        return few.takes(self.matrices)

    def route(self, ids: Tensor) -> Routing:
        rows, cols = self.matrices["up"].codes.shape[1], self.matrices["up"].cols
        expert = 2 * rows * cols * len(self.matrices)
        return route(ids, self.count, max(1, piece_nbytes(self.device) // expert))

    def dense(
        self, names: Sequence[str], experts: Tensor | None, dtype: torch.dtype = torch.bfloat16, more_columns: int = 0,
        more_rows: int = 0,
    ) -> Tensor:  # fmt: skip
        """[m, rows, cols] of some experts, None: of all, bfloat16 or float32; projections one below the other.

        More rows and columns are not set.
        """
        if experts is None:
            experts = torch.arange(self.count, device=self.device)
        heights = [self.matrices[name].codes.shape[1] for name in names]
        cols = self.matrices[names[0]].cols
        size = len(experts), sum(heights) + more_rows, cols + more_columns
        out = torch.empty(size, dtype=dtype, device=self.device)
        parts = out[:, : sum(heights), :cols].split(heights, 1)
        for name, part in zip(names, parts, strict=True):
            if dtype == torch.bfloat16 and fast.usable(self.device):
                from coterie.gpu.kernels.dequantise import dequantise

                dequantise(self.matrices[name], experts, part)
            else:
                self.matrices[name].dense(experts, part)
        return out


@functools.cache
def _memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0


def piece_nbytes(device: torch.device) -> int:
    """Of the dense weights that there are at once."""
    return max(PIECE_NBYTES, int(_memory(device) * PIECE_SHARE))


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
        self.hidden_size, self.has_gate, self.factors = x.shape[1], "gate" in resident.first, factors
        lora = {name: (i, scaling) for i, (name, scaling) in enumerate(zip(names, scalings, strict=True))}

        def adapter(names: Sequence[str]) -> Adapter:
            return Adapter.of([(*lora.get(name, (None, 1.0)), resident.height(name)) for name in names], factors)

        self.before, self.behind = adapter(resident.first), adapter(("down",))
        self.x = _with_zeros(x, self.before.rank)
        weights = weights.flatten()[self.routing.order].float()
        self.weights = torch.where(self.routing.tokens < len(x), weights, 0)

    def output(self, kept: list[Tensor] | None = None) -> Tensor:
        """The output [T,H]; what the backward is to know of each piece, `KEPT` tensors, is added to `kept`."""
        found = []
        for piece in self.routing.pieces:
            before, low_before = self._through(piece, self.resident.first, self.before, self.rows(piece, self.x))
            for name, part in zip(self.resident.first, before.chunk(len(self.resident.first), 1), strict=True):
                if name in self.resident.biases:
                    part += self.bias(piece, name)
            out, low_behind = self._through(piece, ("down",), self.behind, self.activated(piece, before))
            if "down" in self.resident.biases:
                out += (self.bias(piece, "down") * self.weights[piece.rows, None]).to(torch.bfloat16)
            found.append(out)
            if kept is not None:
                kept += before, low_before, low_behind
        return self._summed(found)

    def gradients(
        self, grad: Tensor, kept: Sequence[Tensor], wanted: bool, grads: list[Tensor | None]
    ) -> tuple[Tensor | None, Tensor]:
        """Gradients of x, where it is wanted, and of the weights, float32, from that of the output [T,H].

        Those of A and B are written to `grads`, in the order of the factors.
        """
        grad = _with_zeros(grad, self.behind.rank)
        grad_weights = torch.zeros(self.shape.numel(), dtype=torch.float32, device=self.x.device)
        resident, found = self.resident, []
        for i, piece in enumerate(self.routing.pieces):
            before, low_before, low_behind = kept[KEPT * i : KEPT * (i + 1)]
            grad_rows = self.rows(piece, grad)
            back, low_grad = self._back(piece, ("down",), self.behind, grad_rows)
            weights, wants = self.weights[piece.rows], self.behind.rank > 0
            change, own, hidden = slope(
                resident.activation, before, back, weights, self.has_gate, self.before.rank, wants
            )
            if hidden is not None:
                self.behind.write_gradients(
                    grads, piece.experts, partial(gram, low_grad, hidden, piece.ends),
                    partial(gram, grad_rows[:, : self.hidden_size], low_behind, piece.ends),
                )  # fmt: skip
            if "down" in resident.biases:
                own += (grad_rows[:, : self.hidden_size] * self.bias(piece, "down")).sum(1)
            grad_weights[self.routing.order[piece.rows]] = own
            back_rows, low_grad = self._back(piece, resident.first, self.before, change, wanted)
            found.append(back_rows)
            if self.before.rank:
                tokens = self.routing.tokens[piece.rows]
                self.before.write_gradients(
                    grads, piece.experts, partial(gathered_gram, low_grad, self.x, tokens, piece.ends),
                    partial(gram, change[:, : self.before.rows], low_before, piece.ends),
                )  # fmt: skip
        return self._summed(found) if wanted else None, grad_weights.view(self.shape)

    def rows(self, piece: Piece, tokens: Tensor) -> Tensor:
        """The piece's rows of tokens [T + 1, ...]."""
        return tokens.index_select(0, self.routing.tokens[piece.rows])

    def activated(self, piece: Piece, before: Tensor) -> Tensor:
        """The hidden values times their routing weights, bfloat16 [rows, I + R]; R columns are not set."""
        weights, more = self.weights[piece.rows], self.behind.rank
        return activated(self.resident.activation, before, weights, self.has_gate, more)

    def bias(self, piece: Piece, name: str) -> Tensor:
        """Float32 [rows, ...]."""
        row = torch.arange(piece.rows.stop - piece.rows.start, dtype=torch.int32, device=self.x.device)
        expert = torch.searchsorted(piece.ends, row, right=True)
        return self.resident.biases[name][expert if piece.experts is None else piece.experts[expert]]

    def _through(self, piece: Piece, names: Sequence[str], lora: Adapter, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n, cols + R] times matrices one below the other -> [n, rows], and what A makes of them, [n, R].

        The last R columns of the rows are for what A makes of the others, those of the weights for B.
        """
        cols = rows.shape[1] - lora.rank
        weights = self.resident.dense(names, piece.experts, more_columns=lora.rank)
        if not lora.rank:
            return product(rows, weights.mT, piece.ends), rows.new_empty(0)
        a, b = lora.weights(self.factors, piece.experts)
        low = product(rows[:, :cols], a.mT, piece.ends)
        rows[:, cols:], weights[..., cols:] = low, b
        return product(rows, weights.mT, piece.ends), low

    def _back(
        self, piece: Piece, names: Sequence[str], lora: Adapter, grad: Tensor, wanted: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the rows, where it is wanted, and of `low`, from that of the output [n, rows + R].

        The last R columns are for the gradient of `low`, the last R rows of the weights for A.
        """
        height, low_grad = grad.shape[1] - lora.rank, grad.new_empty(0)
        weights = self.resident.dense(names, piece.experts, more_rows=lora.rank) if wanted else None
        if lora.rank:
            a, b = lora.weights(self.factors, piece.experts)
            low_grad = product(grad[:, :height], b, piece.ends)
            if weights is not None:
                grad[:, height:], weights[:, height:] = low_grad, a
        return grad.new_empty(0) if weights is None else product(grad, weights, piece.ends), low_grad

    def _summed(self, found: Sequence[Tensor]) -> Tensor:
        """[T,H]: the sum of each token's rows of all pieces; rows that are in none have no expert."""
        missing = self.shape.numel() - sum(len(rows) for rows in found)
        found = [*found, self.x.new_zeros(missing, self.hidden_size)] if missing or not found else found
        rows = found[0] if len(found) == 1 else torch.cat(found)
        return combined(rows, self.routing.place.view(self.shape), self.dtype)


def _with_zeros(tokens: Tensor, more: int) -> Tensor:
    """[T, H] -> bfloat16 [T + 1, H + more]: the last row stands for slots without an expert."""
    return F.pad(tokens.to(torch.bfloat16), (0, more, 0, 1))
