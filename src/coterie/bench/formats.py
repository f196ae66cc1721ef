"""Decoding one token in every format and instruction set, beside what the memory can deliver."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from coterie import cpu, machine
from coterie.bench.layer import draw
from coterie.bench.layer_steps import random_experts
from coterie.bench.shapes import Shape
from coterie.bench.timing import median_seconds, read_in_turns
from coterie.errors import ArgumentError
from coterie.formats import FORMATS, Format, resolve

MEMORY = "memory"


@dataclass(frozen=True, slots=True)
class FormatResult:
    """One token through one layer in one format.

    bytes_per_weight: packed, scales included. bandwidth: bytes a second that all threads read.
    share: by instruction set, the bytes of the token's experts over their time, of the bandwidth in the same round.
    """

    spec: Format
    bytes_per_weight: float
    bandwidth: float
    share: dict[str, float]


def bench_formats(
    shape: Shape, formats: Sequence[str], isas: Sequence[str], seconds: float = 0.3, rounds: int = 5
) -> Iterator[FormatResult]:
    """Yields a result for each format; memory: the packed experts of one format at a time."""
    unknown = sorted(set(formats) - set(FORMATS)) + sorted(set(isas) - set(cpu.info().isas))
    if unknown:
        known = f"formats {', '.join(FORMATS)}; instruction sets of this CPU {', '.join(cpu.info().isas)}"
        raise ArgumentError(f"unknown {unknown[0]!r}: expected {known}")
    before = cpu.current_isa()
    try:
        for name in formats:
            yield _format(shape, resolve(name), isas, seconds, rounds)
    finally:
        cpu.use_isa(before)


def _format(shape: Shape, spec: Format, isas: Sequence[str], seconds: float, rounds: int) -> FormatResult:
    experts = random_experts(shape, spec)
    draws = [draw(shape, 1, seed) for seed in range(24)]

    def clock(isa: str) -> Callable[[], float]:
        def measure() -> float:
            cpu.use_isa(isa)
            with torch.inference_mode():
                return median_seconds(lambda number: experts(*draws[number % len(draws)]), seconds)

        return measure

    def read() -> float:
        cpu.use_isa(cpu.info().isas[0])  # plain C++ reads more slowly
        return 1 / machine.read_bandwidth()

    turns = read_in_turns({MEMORY: read, **{isa: clock(isa) for isa in isas}}, rounds)
    touched = shape.K * experts.expert_nbytes
    return FormatResult(
        spec=spec,
        bytes_per_weight=experts.expert_nbytes / (3 * shape.H * shape.I),
        bandwidth=statistics.median(1 / s for s in turns.rounds[MEMORY]),
        share={isa: touched * turns.ratio(MEMORY, isa) for isa in isas},
    )
