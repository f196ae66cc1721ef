"""What a conversion did: sizes, time, and how far the packed weights are from the source's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(slots=True)
class ProjectionError:
    """Relative reconstruction error ||W - packed(W)|| / ||W|| over the matrices of one projection."""

    mean: float = 0.0
    worst: float = 0.0
    worst_layer: int = -1
    worst_expert: int = -1
    matrices: int = 0

    def add(self, layer: int, expert: int, error: float) -> None:
        self.matrices += 1
        self.mean += (error - self.mean) / self.matrices
        if error > self.worst or self.matrices == 1:
            self.worst, self.worst_layer, self.worst_expert = error, layer, expert


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """source_bytes and packed_bytes count the experts alone, rest_bytes every other tensor; errors by projection."""

    source: Path
    output: Path
    quant_method: str
    group_size: int
    zero_point: bool
    layers: tuple[int, ...]
    source_bytes: int
    packed_bytes: int
    rest_bytes: int
    seconds: float
    errors: dict[str, ProjectionError]


def relative_error(source: Tensor, packed: Tensor, rows: int = 128) -> float:
    """||source - packed|| / ||source|| of two equal-shaped matrices, in row blocks; 0 where both are all zero."""
    difference = total = 0.0
    for a, b in zip(source.split(rows), packed.split(rows), strict=True):
        a = a.float()
        difference += float(torch.linalg.vector_norm(a - b)) ** 2
        total += float(torch.linalg.vector_norm(a)) ** 2
    if total == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return (difference / total) ** 0.5
