"""Where the time of a decoded token goes, layer by layer, beside what reading its weights takes at least."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch

from coterie import machine
from coterie.bench.decode import Decoder
from coterie.hf.clock import Clock, Part

TOKENS = 32


@dataclass(frozen=True, slots=True)
class Profile:
    """A decoded token: each part as it was in its median call; bandwidth in bytes per second, measured beside it."""

    layers: list[Part]
    outside: Part  # the head, and what is around the layers
    bandwidth: float

    @property
    def seconds(self) -> float:
        return self.outside.seconds + sum(layer.seconds for layer in self.layers)

    @property
    def rest(self) -> float:
        """Seconds of a layer, on average, that are neither products nor attention."""
        return statistics.mean(layer.rest for layer in self.layers)

    def seconds_of(self, layers: int) -> float:
        """Seconds of a token through so many layers, such as these are on average."""
        return self.outside.seconds + layers * statistics.mean(layer.seconds for layer in self.layers)


def profile_decode(model: Any, prompt: torch.Tensor) -> Profile:
    """Decodes TOKENS tokens of one sequence, `prompt` [1, P] int64, after two that are not counted."""
    decoder = Decoder(model, prompt, TOKENS + 2)
    decoder()
    decoder()
    with Clock(model) as clock:
        for _ in range(TOKENS):
            decoder()
    outside, *layers = (_median(calls) for calls in zip(*clock.forwards, strict=True))
    return Profile(layers, outside, machine.read_bandwidth())


def _median(calls: tuple[Part, ...]) -> Part:
    return sorted(calls, key=lambda part: part.seconds)[len(calls) // 2]
