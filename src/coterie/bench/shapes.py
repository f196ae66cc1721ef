"""Shapes of expert layers, by the names of models that have them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from coterie.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Shape:
    """One layer: E experts of hidden size H and intermediate size I, K experts per token."""

    E: int
    H: int
    I: int  # noqa: E741 (the name of the field)
    K: int

    def __post_init__(self) -> None:
        if min(self.E, self.H, self.I, self.K) < 1 or self.K > self.E:
            raise ArgumentError(f"{self} is no shape: expected all sizes at least 1, and K at most E")


SHAPES = {
    "tiny": Shape(E=16, H=1024, I=512, K=4),
    "qwen3-30b": Shape(E=128, H=2048, I=768, K=8),
    "mixtral": Shape(E=8, H=4096, I=14336, K=2),
    "olmoe": Shape(E=64, H=2048, I=1024, K=8),
    "qwen3.5-35b": Shape(E=256, H=2048, I=512, K=8),
}


def parse_shape(text: str) -> Shape:
    """A shape by name, or free: "E=128,H=2048,I=768,K=8". Raises ArgumentError."""
    if text in SHAPES:
        return SHAPES[text]
    sizes = dict(re.findall(r"([EHIK])=(\d+)", text))
    if set(sizes) != set("EHIK") or re.sub(r"[EHIK]=\d+", "", text).strip(", "):
        names = ", ".join(SHAPES)
        raise ArgumentError(f"unknown shape {text!r}: expected one of {names}, or one like E=128,H=2048,I=768,K=8")
    return Shape(**{name: int(value) for name, value in sizes.items()})
