"""A training step of one layer: its forward, and what the backward needs of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie import ops
from coterie.experts import Experts
from coterie.lora import ExpertLora


@dataclass(frozen=True, slots=True)
class Step:
    """What a forward keeps: x [T,H] bf16 or f32, ids and weights [T,K], and pre-activations of gate and up."""

    experts: Experts
    x: Tensor
    ids: Tensor
    weights: Tensor
    gate: Tensor
    up: Tensor


def forward(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora) -> tuple[Tensor, Step]:
    """The output [T,H] and the step."""
    x = x.float() if x.dtype == torch.float16 else x
    x, ids, weights = x.contiguous(), ids.contiguous(), weights.contiguous()
    with torch.no_grad():
        out, gate, up = ops.experts_train(
            x, ids, weights, experts._handle, *_factors(lora), lora.scalings(), False, experts.intermediate_size,
            experts.has_gate,
        )  # fmt: skip
    return out, Step(experts, x, ids, weights, gate, up)


def backward(step: Step, grad: Tensor, lora: ExpertLora, trains: bool) -> list[Tensor]:
    """Gradients of x [T,H] and of the weights [T,K], and where LoRA `trains` of A and B of gate, up and down.

    Where it does not, the gradients are those that go through the frozen weights.
    """
    factors = _factors(lora) if trains else (None,) * 6
    with torch.no_grad():
        found = ops.experts_backward(
            grad.to(step.x.dtype).contiguous(), step.x, step.ids, step.weights, step.gate, step.up,
            step.experts._handle, *factors, lora.scalings(), False, [trains] * 6,
        )  # fmt: skip
    grad_x, grad_weights, *grads = found
    if not trains:
        return [grad_x, grad_weights]
    return [grad_x, grad_weights, *(g.to(f.dtype) for g, f in zip(grads, lora.factors(), strict=True) if f is not None)]


def _factors(lora: ExpertLora) -> tuple[Tensor | None, ...]:
    return tuple(ops.engine_factor(factor) for factor in lora.factors())
