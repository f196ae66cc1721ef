"""Training steps of one layer of packed experts by themselves, with a routing given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from coterie.bench.layer import draw
from coterie.bench.shapes import Shape
from coterie.bench.steps import Steps
from coterie.experts import Experts
from coterie.formats import Format
from coterie.lora import ExpertLora


class LayerSteps(Steps):
    """Forward and backward of `experts`: gradients of its input, of the routing weights and of `parameters`."""

    def __init__(self, shape: Shape, experts: Callable[..., Tensor], parameters: Sequence[Tensor], frozen: int = 0):
        self.shape, self.experts, self.parameters = shape, experts, parameters
        self.frozen, self.trained = frozen, sum(parameter.nbytes for parameter in parameters)

    def prepare(self, tokens: int) -> None:
        self.x, self.ids, self.weights = draw(self.shape, tokens, seed=0)
        self.x.requires_grad_()
        self.weights.requires_grad_()
        self.grad = torch.full_like(self.x, 0.1)

    def step(self, number: int = 0) -> None:
        self.experts(self.x, self.ids, self.weights).backward(self.grad)
        for tensor in (self.x, self.weights, *self.parameters):
            tensor.grad = None


def random_experts(shape: Shape, spec: Format) -> Experts:
    """Packed experts that all have the same random weights."""
    experts = Experts.empty(shape.E, shape.H, shape.I, format=spec)
    random = torch.Generator().manual_seed(0)
    for name in experts.projections:
        rows, cols = experts.shape(name)
        matrix = torch.randn(rows, cols, generator=random) / cols**0.5
        for e in range(shape.E):
            experts.pack_projection(name, e, matrix)
    return experts


def lora_steps(shape: Shape, experts: Experts, rank: int) -> LayerSteps:
    """Steps with an ExpertLora of random float32 factors on gate, up and down."""
    random = torch.Generator().manual_seed(1)
    gate_a, gate_b, up_a, up_b, down_a, down_b = factors = [
        (torch.randn(shape.E, *size, generator=random) * 0.02).requires_grad_()
        for rows, cols in ((shape.I, shape.H), (shape.I, shape.H), (shape.H, shape.I))
        for size in ((rank, cols), (rows, rank))
    ]
    lora = ExpertLora(gate_a, gate_b, up_a, up_b, down_a, down_b, scaling=2.0)
    return LayerSteps(shape, partial(experts, lora=lora), factors, experts.nbytes)
