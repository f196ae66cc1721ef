"""Batches with whatever can be wrong with the order of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from gradient_cases import random_batch
from torch import Tensor

SIZES = (6, 128, 256)


def batches() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, x, ids, routing weights) for six experts."""
    x, ids, weights, _ = random_batch(SIZES, 3, 40)
    yield "ragged, duplicates and -1", x, ids, weights
    yield "one expert", x, torch.full_like(ids, 4), weights
    yield "one expert is missing", x, ids.where(ids != 1, 5), weights
    yield "nothing", x, torch.full_like(ids, -1), weights
    yield "one token", x[:1], torch.tensor([[5, 0, 5]]), weights[:1]
    yield "no tokens", x[:0], ids[:0], weights[:0]
    yield "no experts a token", x, ids[:, :0], weights[:, :0]
    yield "int32, strided", x.T.contiguous().T, ids.int().T.contiguous().T, weights.half().T.contiguous().T


def check_compiled(experts: Callable[..., Tensor], x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """The rest of a graph is compiled, the experts are not, and nothing changes."""

    def block(x: Tensor) -> Tensor:
        return torch.relu(experts(x * 2, ids, weights)) + x

    torch._dynamo.reset()
    found = []
    for compute in (block, torch.compile(block, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = compute(leaf)
        found.append((y, *torch.autograd.grad(y.sum(), leaf)))
    torch.testing.assert_close(*found)
