"""A training step of one MoE block, LoRA on its experts, beside PEFT's own on Transformers' experts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from coterie.bench.layer import check_peer, transformers_experts
from coterie.bench.random_model import pack
from coterie.bench.shapes import Shape
from coterie.bench.steps import Steps, frozen_and_trained, with_lora
from coterie.bench.train import TrainResult, check_sizes, compare
from coterie.formats import Format, resolve
from coterie.hf.experts import NAME


class BlockSteps(Steps):
    """Forward and backward through router and experts, gradients of the input and of LoRA.

    With `spec` the experts are packed, of the same weights that `implementation` has in bf16.
    """

    def __init__(self, shape: Shape, implementation: str, spec: Format | None, rank: int):
        self.hidden = shape.H
        self.model = with_lora(moe_block(shape, implementation, spec), rank)
        self.frozen, self.trained = frozen_and_trained(self.model)

    def prepare(self, tokens: int) -> None:
        random = torch.Generator().manual_seed(tokens)
        self.x = torch.randn(1, tokens, self.hidden, generator=random).bfloat16().requires_grad_()
        self.grad = (torch.randn(1, tokens, self.hidden, generator=random) * 0.1).bfloat16()

    def step(self, number: int = 0) -> None:
        self.model(self.x).backward(self.grad)
        self.model.zero_grad()
        self.x.grad = None


def moe_block(shape: Shape, implementation: str, spec: Format | None) -> Any:
    """Transformers' MoE block of Qwen3 with random weights; with `spec` its experts are packed."""
    experts = transformers_experts(shape, implementation)
    if spec is not None:
        pack(experts, experts, spec)
    with torch.device("meta"):
        block: Any = Qwen3MoeSparseMoeBlock(experts.config)
    block.experts = experts
    router = torch.randn(shape.E, shape.H, generator=torch.Generator().manual_seed(1)) / shape.H**0.5
    block.gate.weight = torch.nn.Parameter(router.bfloat16(), requires_grad=False)
    return block


def bench_train_layer(
    shape: Shape,
    format: str = "int4",
    group_size: int | None = None,
    zero_point: bool = False,
    tokens: tuple[int, ...] = (64, 512, 2048),
    rank: int = 16,
    peer: str = "grouped_mm",
    seconds: float = 1.0,
    rounds: int = 3,
) -> Iterator[TrainResult]:
    """Yields one result per number of tokens. Memory: the bf16 weights twice while ours are packed, then once."""
    check_peer(peer)
    check_sizes(tokens, rank)
    ours = partial(BlockSteps, shape, NAME, resolve(format, group_size, zero_point), rank)
    yield from compare(ours, partial(BlockSteps, shape, peer, None, rank), tokens, seconds, rounds)
