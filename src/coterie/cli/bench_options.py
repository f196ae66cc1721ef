"""Options that the bench commands have in common, and the line that every one of their tables ends with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.console import console
from coterie.errors import ArgumentError

if TYPE_CHECKING:
    from coterie.bench.shapes import Shape

Experts = Annotated[str, typer.Option(help="Format of the packed experts: bf16, int8, int4, fp8_block ...")]
GroupSize = Annotated[int | None, typer.Option(help="Columns that share a scale. [default: the format's]")]
ZeroPoint = Annotated[bool, typer.Option("--zero-point", help="int4 with zero points.")]
Peer = Annotated[str, typer.Option(help="Transformers' implementation to compare with: grouped_mm or eager.")]
Seconds = Annotated[float, typer.Option(help="Seconds of a turn.")]
Rounds = Annotated[int, typer.Option(help="Turns of each side; medians are reported.", min=1)]


def read_counts(option: str, text: str) -> tuple[int, ...]:
    """(1, 16) of "1,16". Raises ArgumentError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ArgumentError(f"{option} is {text!r}: expected numbers of at least 1, like 1,16,256")
    return tuple(int(part) for part in parts)


def describe(shape: Shape) -> str:
    return f"E={shape.E} H={shape.H} I={shape.I} K={shape.K}"


def print_machine(rounds: int, compared: bool = True) -> None:
    """CPU, kernels, threads, and how to read the figures above, ratios where two were `compared`."""
    from coterie import cpu

    info = cpu.info()
    turns = " taking turns, ratio below 1: coterie is faster" if compared else ""
    console.print(
        f"{info.model}, {info.isa} kernels, {info.threads} threads; medians of {rounds} rounds{turns}", style="dim"
    )
