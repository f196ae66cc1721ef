"""Two or more ways to do the same work, timed in turns, so that a drifting machine drifts for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial

SETTLE = 0.1  # seconds before a turn, in which the threads of the one before stop spinning


class Turns:
    """Median seconds per call of each contestant in each round."""

    def __init__(self, rounds: dict[str, list[float]]):
        self.rounds = rounds

    def seconds(self, name: str) -> float:
        """Median over the rounds."""
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, other: str) -> float:
        """Time of `name` over time of `other`, the median of the rounds' ratios: below 1 is faster."""
        pairs = zip(self.rounds[name], self.rounds[other], strict=True)
        return statistics.median(a / b for a, b in pairs)


def take_turns(calls: Mapping[str, Callable[[int], object]], seconds: float, rounds: int) -> Turns:
    """Each call gets `seconds` (three calls at least) per round; it is given a running number to draw its input by."""
    for call in calls.values():
        call(0)
    return read_in_turns({name: partial(median_seconds, call, seconds) for name, call in calls.items()}, rounds)


def read_in_turns(clocks: Mapping[str, Callable[[], float]], rounds: int) -> Turns:
    """Each clock measures its contestant once per round, and gives its seconds per call."""
    found: dict[str, list[float]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            time.sleep(SETTLE)
            found[name].append(clock())
    return Turns(found)


def median_seconds(call: Callable[[int], object], seconds: float, least: int = 3) -> float:
    """Median time of the calls that fit in `seconds`, `least` at least."""
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < least or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - before)
    return statistics.median(times)
