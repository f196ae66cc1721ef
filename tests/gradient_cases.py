"""Adapters and batches for training, and all gradients of a forward."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie import ExpertLora

# Against plain float32: bf16 activations, LoRA factors and gradients; every rounding is 2^-9 relative, and a few in a
# row, on small shapes, do not average out.
TOLERANCE = 0.015
# Against the engine's own roundings (gradient_truth.py): float32 sums in another order, which move a value over a
# rounding boundary now and then. That is 2^-8 of this one value.
ROUNDED_TOLERANCE = 2**-9


def relative(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    scale = wanted.float().norm()
    return ((found.float() - wanted.float()).norm() / scale).item() if scale else found.float().norm().item()


def random_lora(sizes: tuple[int, int, int], rank: int, dtype: torch.dtype, has_gate: bool = True) -> dict[str, Tensor]:
    count, hidden, intermediate = sizes
    random, made = torch.Generator().manual_seed(rank), {}
    for name in ("gate", "up", "down") if has_gate else ("up", "down"):
        cols, rows = (intermediate, hidden) if name == "down" else (hidden, intermediate)
        made[f"{name}_a"] = (torch.randn(count, rank, cols, generator=random) / cols**0.5).to(dtype)
        made[f"{name}_b"] = (torch.randn(count, rows, rank, generator=random) * 0.1).to(dtype)
    return made


def random_batch(
    sizes: tuple[int, int, int], top_k: int, tokens: int, draw: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, ids (from two tokens on with a -1 and a duplicate), routing weights and the gradient of the output."""
    random = torch.Generator().manual_seed(tokens + 1000 * draw)
    x, grad = torch.randn(2, tokens, sizes[1], generator=random).bfloat16()
    ids = torch.rand(tokens, sizes[0], generator=random).topk(top_k, dim=1).indices
    if tokens > 1:
        ids[0, 0] = -1
        ids[1, -1] = ids[1, 0]
    return x, ids, torch.rand(tokens, top_k, generator=random) + 0.1, grad


def gradients(
    forward, x: Tensor, weights: Tensor, lora: dict[str, Tensor | None], grad: Tensor, dtype=None, scaling=2.0
) -> dict[str, Tensor]:
    """The output y and all gradients, computed in `dtype`; where up_a is None, gate and up share one A."""
    x, weights = x.detach().to(dtype or x.dtype).requires_grad_(), weights.detach().clone().requires_grad_()
    lora = {n: t.detach().to(dtype or t.dtype).clone().requires_grad_() for n, t in lora.items() if t is not None}
    shared = {"up_a": lora["gate_a"]} if "up_b" in lora and "up_a" not in lora else {}
    y = forward(x, weights, ExpertLora(**lora, **shared, scaling=scaling))
    found = torch.autograd.grad(y, [x, weights, *lora.values()], grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(["x", "weights", *lora], found, strict=True))}
