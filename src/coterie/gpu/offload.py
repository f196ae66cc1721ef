"""The forward of experts in RAM for tokens on a GPU: copied there, computed, copied back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coterie import ops
from coterie.border import runs_now
from coterie.errors import ArgumentError
from coterie.gpu.transfer import Transfer, transfer
from coterie.lora import ExpertLora

if TYPE_CHECKING:
    from coterie.experts import Experts


def forward(
    experts: Experts,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    lora: ExpertLora | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Tensor:
    """See Experts.__call__: x, ids and weights are on one device, LoRA's factors there or in RAM. So are gradients.

    meanwhile: queues work of the device that it is to do while the CPU computes.
    """
    device = x.device
    for name, tensor in (("ids", ids), ("weights", weights)):
        if tensor.device != device:
            raise ArgumentError(f"{name}: expected a tensor on {device}, as x is, found {tensor.device}")
    lora = lora or ExpertLora()
    factors = list(lora.factors())
    shared = factors[0] is factors[2]  # gate and up have one A, or none
    if shared:
        factors[2] = None
    there = [i for i, factor in enumerate(factors) if factor is not None and factor.device == device]
    inputs = (x, ids, weights, *(factors[i] for i in there))
    if runs_now():
        copies = transfer(device)
        x, ids, weights, *moved = _ToHost.apply(copies, *inputs)
    else:  # torch traces copies of its own, not a wait for a stream
        copies = None
        x, ids, weights, *moved = [tensor.to("cpu") for tensor in inputs]
    for i, factor in zip(there, moved, strict=True):
        factors[i] = factor
    if shared:
        factors[2] = factors[0]
    meanwhile()
    given = any(factor is not None for factor in factors)
    out = ops.forward(experts, x, ids, weights, ExpertLora(*factors, lora.scaling) if given else None)
    return out.to(device) if copies is None else _ToDevice.apply(copies, out)


class _ToHost(torch.autograd.Function):
    """Tensors copied to RAM, their gradients back to the device."""

    @staticmethod
    def forward(ctx: Any, copies: Transfer, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = tuple(copies.to_host(tensors))
        ctx.copies = copies
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, need in zip(found, ctx.needs_input_grad[1:], strict=True) if not need))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        # Autograd orders the streams of nodes whose outputs were on a device; those of this one were in RAM.
        return None, *_where_given(functools.partial(ctx.copies.to_device, wait=True), grads)


class _ToDevice(torch.autograd.Function):
    """A tensor copied to the device, its gradient back to RAM."""

    @staticmethod
    def forward(ctx: Any, copies: Transfer, tensor: Tensor) -> Tensor:
        ctx.copies = copies
        ctx.set_materialize_grads(False)
        return copies.to_device([tensor])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[None, Tensor | None]:
        return None, *_where_given(ctx.copies.to_host, [grad])


def _where_given(
    copy: Callable[[Sequence[Tensor]], list[Tensor]], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Copies of the gradients that there are."""
    copies = iter(copy([grad for grad in grads if grad is not None]))
    return [None if grad is None else next(copies) for grad in grads]
