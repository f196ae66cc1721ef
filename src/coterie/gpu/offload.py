"""The forward of experts in RAM for tokens on a GPU: copied there, computed, copied back.

Few tokens go there in the order of the GPU's stream (ordered.py); more, and those with gradients, are waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from coterie import ops
from coterie.border import is_traced
from coterie.errors import ArgumentError
from coterie.gpu import ordered
from coterie.gpu.transfer import Transfer, transfer
from coterie.lora import ExpertLora

if TYPE_CHECKING:
    from coterie.experts import Experts

_Inputs = tuple[Tensor, Tensor, Tensor, ExpertLora]  # x, ids, weights and LoRA, in RAM


def forward(
    experts: Experts,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    lora: ExpertLora | None = None,
    meanwhile: Callable[[], None] | None = None,
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
    learns = ops.needs_gradients(x, weights, *factors)
    in_order = ordered.possible(device, len(x)) and all(factor is None or factor.is_cpu for factor in factors)
    if in_order and not learns and not is_traced():
        ops.check_batch(experts, x, ids, weights, device)
        lora.check(experts)
        return ordered.forward(experts, x, ids, weights, lora, meanwhile)
    meanwhile = meanwhile or _nothing
    shared = factors[0] is factors[2]  # gate and up have one A, or none
    if shared:
        factors[2] = None
    there = [i for i, factor in enumerate(factors) if factor is not None and factor.device == device]
    inputs = (x, ids, weights, *(factors[i] for i in there))

    def in_ram(copied: Sequence[Tensor]) -> _Inputs:
        moved = list(factors)
        for i, factor in zip(there, copied[3:], strict=True):
            moved[i] = factor
        if shared:
            moved[2] = moved[0]
        return *copied[:3], ExpertLora(*moved, lora.scaling)

    if is_traced():  # torch traces copies of its own, not a wait for a stream
        copied = in_ram([tensor.to("cpu") for tensor in inputs])
        meanwhile()
        return ops.forward(experts, *copied).to(device)
    copies = transfer(device)
    copied = in_ram(copies.to_host([tensor.detach() for tensor in inputs]))
    if learns:
        return _Compute.apply(x, ids, weights, _Call(experts, copies, copied, meanwhile), *factors)
    meanwhile()
    return copies.to_device([ops.forward(experts, *copied)])[0]


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class _Call:
    """What a call takes besides tensors."""

    experts: Experts
    copies: Transfer
    inputs: _Inputs
    meanwhile: Callable[[], None]


class _Compute(torch.autograd.Function):
    """A call that has gradients, as one node; inputs stand where those of `ops.experts_train` do.

    Its backward runs on the thread that autograd has for the device, as that of all else in a layer does. Nodes of the
    CPU run on another, and where both need what a checkpoint is to recompute, both would recompute it.
    What the device does meanwhile has nodes that are made later, and are therefore first in the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ids: Tensor, weights: Tensor, call: _Call, *factors: Tensor | None) -> Tensor:
        ops.checked(call.experts, *call.inputs)
        with torch.enable_grad():
            call.meanwhile()
        inputs = ops.train_inputs(call.experts, *call.inputs)
        output = ops.experts_train(*inputs)
        ops.setup_context(ctx, inputs, output)
        ctx.copies, ctx.originals = call.copies, [_kind(t) for t in (x, ids, weights, None, *factors)]
        return call.copies.to_device([output[0].to(x.dtype)])[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.originals)
        (grad,) = ctx.copies.to_host([grad])
        grads = list(ops.backward(ctx, grad.float() if grad.dtype == torch.float16 else grad)[: len(ctx.originals)])
        there = []
        for i, (original, needed) in enumerate(zip(ctx.originals, ctx.needs_input_grad, strict=True)):
            found = grads[i] if needed else None
            grads[i] = found if found is None else found.to(original[1])
            if found is not None and original[0] == ctx.copies.device:
                there.append(i)
        for i, moved in zip(there, ctx.copies.to_device([grads[i] for i in there]), strict=True):
            grads[i] = moved
        return tuple(grads)


def _kind(tensor: Tensor | None) -> tuple[torch.device, torch.dtype] | None:
    return None if tensor is None else (tensor.device, tensor.dtype)
