"""What a conversion did: sizes, time, and how far the packed weights are from the source's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coterie.formats import Format


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
    """source_bytes and packed_bytes count the experts alone, rest_source_bytes and rest_bytes every other tensor;
    errors by projection, 0 where codes and scales were kept. sources: the formats that the experts were in, None for
    plain ones. repacked: matrices whose codes no format holds, so that they were packed anew whatever was asked for;
    odd: in words, which.
    """

    source: Path
    output: Path
    quant_method: str
    group_size: int
    zero_point: bool
    layers: tuple[int, ...]
    source_bytes: int
    packed_bytes: int
    rest_source_bytes: int
    rest_bytes: int
    seconds: float
    errors: dict[str, ProjectionError]
    sources: tuple[Format | None, ...]
    repacked: int
    odd: str

    @property
    def quantised(self) -> tuple[Format, ...]:
        """The formats that the experts were quantised in."""
        return tuple(spec for spec in self.sources if spec is not None)

    @property
    def own(self) -> bool:
        """Whether the format is that of the source."""
        return self.sources == (Format(self.quant_method, self.group_size, self.zero_point),)

    @property
    def kept(self) -> bool:
        """Whether all codes are those of the source."""
        return self.own and not self.repacked
