"""The function between an expert's first and second matrix."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ArgumentError

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")  # in the order of the native enum


@dataclass(frozen=True, slots=True)
class Activation:
    """``act(gate) * (up + up_offset)``, or ``act(up)`` for an MLP without a gate.

    Attributes:
        kind: ``silu`` x sigmoid(alpha x), ``gelu`` (erf), ``gelu_tanh``, ``relu``, ``relu2`` (its square).
        alpha: slope of the sigmoid in ``silu``; gpt-oss uses 1.702.
        limit: if positive, gate is clamped to at most ``limit`` and up to ``[-limit, limit]`` first (gpt-oss: 7).
        up_offset: added to up; gpt-oss uses 1.
    """

    kind: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    up_offset: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ArgumentError(f"unknown activation {self.kind!r}: expected one of {', '.join(KINDS)}")

    def native(self) -> tuple[int, float, float, float]:
        return KINDS.index(self.kind), self.alpha, self.limit, self.up_offset
