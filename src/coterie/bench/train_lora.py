"""What LoRA adds to the time of a training step of one layer of packed experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from coterie.bench.layer import experts_on_meta
from coterie.bench.layer_steps import LayerSteps, lora_steps, random_experts
from coterie.bench.shapes import Shape
from coterie.bench.steps import with_lora
from coterie.bench.timing import take_turns
from coterie.bench.train import check_sizes
from coterie.formats import resolve
from coterie.hf.experts import NAME
from coterie.hf.layout import read_layout
from coterie.hf.modules import attach


@dataclass(frozen=True, slots=True)
class LoraResult:
    """A step of T tokens: seconds without LoRA (gradients of the input and of the routing weights alone), and how
    often that it takes with an ExpertLora, and with the same rank in PEFT's wrappers and layout."""

    tokens: int
    frozen_seconds: float
    lora: float
    peft: float


def bench_train_lora(
    shape: Shape,
    format: str = "int4",
    group_size: int | None = None,
    zero_point: bool = False,
    tokens: tuple[int, ...] = (512, 2048),
    rank: int = 16,
    seconds: float = 1.0,
    rounds: int = 3,
) -> Iterator[LoraResult]:
    """Yields one result per number of tokens."""
    check_sizes(tokens, rank)
    experts = random_experts(shape, resolve(format, group_size, zero_point))
    module = experts_on_meta(shape, NAME)
    attach(module, experts, read_layout(module))
    parent = nn.ModuleDict({"experts": module})
    adapters = [p for p in with_lora(parent, rank).parameters() if p.requires_grad]
    steps = {
        "frozen": LayerSteps(shape, experts, []),
        "lora": lora_steps(shape, experts, rank),
        "peft": LayerSteps(shape, parent["experts"], adapters),
    }
    for count in tokens:
        for side in steps.values():
            side.prepare(count)
        turns = take_turns({name: side.step for name, side in steps.items()}, seconds, rounds)
        yield LoraResult(count, turns.seconds("frozen"), turns.ratio("lora", "frozen"), turns.ratio("peft", "frozen"))
