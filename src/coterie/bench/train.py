"""Two sides that make training steps in processes of their own, taking turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from coterie.bench.layer import OURS, check_tokens
from coterie.bench.process import Remote
from coterie.bench.steps import Steps, Weight
from coterie.bench.timing import read_in_turns
from coterie.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A training step of T tokens: medians in seconds, ours / peer time of the median round, and memory."""

    tokens: int
    seconds: float
    peer_seconds: float
    ratio: float
    weight: Weight
    peer_weight: Weight


def compare(
    ours: Callable[[], Steps], peers: Callable[[], Steps], tokens: tuple[int, ...], seconds: float, rounds: int
) -> Iterator[TrainResult]:
    """Yields one result per number of tokens. Raises DeviceError where memory runs out."""
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Remote(make)) for name, make in ((OURS, ours), ("peer", peers))}
        for count in tokens:
            weights = {name: side.call("weigh", count) for name, side in sides.items()}
            clocks = {name: partial(side.call, "seconds", count, seconds) for name, side in sides.items()}
            turns = read_in_turns(clocks, rounds)
            yield TrainResult(
                tokens=count,
                seconds=turns.seconds(OURS),
                peer_seconds=turns.seconds("peer"),
                ratio=turns.ratio(OURS, "peer"),
                weight=weights[OURS],
                peer_weight=weights["peer"],
            )


def check_sizes(tokens: tuple[int, ...], rank: int) -> None:
    check_tokens(tokens)
    if rank < 1:
        raise ArgumentError(f"rank={rank}: expected at least 1")
