"""What the memory of a training step of one layer grows with: tokens, and not the number of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from coterie.bench.layer_steps import LayerSteps, lora_steps, random_experts
from coterie.bench.process import Remote
from coterie.bench.shapes import Shape
from coterie.bench.steps import Weight
from coterie.bench.train import check_sizes
from coterie.formats import Format, resolve


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """A step of T tokens through one layer of E experts, in bytes."""

    shape: Shape
    tokens: int
    rank: int
    weight: Weight

    @property
    def rest(self) -> int:
        """What a step takes besides weights and LoRA's gradients, which are as large as LoRA."""
        return self.weight.peak - self.weight.trained

    @property
    def per_value(self) -> float:
        """`rest` for each of T*K*(2I+R) values."""
        return self.rest / (self.tokens * self.shape.K * (2 * self.shape.I + self.rank))


def bench_train_memory(
    shape: Shape,
    counts: tuple[int, ...] = (16, 64, 256),
    format: str = "int4",
    group_size: int | None = None,
    zero_point: bool = False,
    tokens: tuple[int, ...] = (512, 2048, 8192),
    rank: int = 16,
) -> Iterator[MemoryResult]:
    """Yields one result per number of experts and of tokens; each number of experts has a process."""
    check_sizes(tokens, rank)
    spec = resolve(format, group_size, zero_point)
    for sizes in [replace(shape, E=count) for count in counts]:
        with Remote(partial(packed_steps, sizes, spec, rank)) as steps:
            for count in tokens:
                yield MemoryResult(sizes, count, rank, steps.call("weigh", count))


def packed_steps(shape: Shape, spec: Format, rank: int) -> LayerSteps:
    return lora_steps(shape, random_experts(shape, spec), rank)
