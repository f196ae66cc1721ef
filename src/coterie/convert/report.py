"""What a conversion did: sizes, time, and how far the packed weights are from the source's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coterie.checkpoints.packed_formats import ModelFormats
from coterie.errors import CheckpointError
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

    def include(self, other: ProjectionError) -> None:
        """Adds the matrices of another, of a later layer."""
        if other.worst > self.worst or not self.matrices:
            self.worst, self.worst_layer, self.worst_expert = other.worst, other.worst_layer, other.worst_expert
        self.matrices += other.matrices
        self.mean += (other.mean - self.mean) * other.matrices / max(1, self.matrices)


@dataclass(slots=True)
class LayerPacking:
    """What packing a layer cost: errors by projection, and how many of its matrices have codes that no format holds."""

    errors: dict[str, ProjectionError] = field(default_factory=dict)
    repacked: int = 0

    def notes(self) -> dict[str, Any]:
        """The same as JSON."""
        return asdict(self)

    @classmethod
    def of(cls, notes: dict[str, Any], layer: int) -> LayerPacking:
        """The inverse of `notes`. Raises CheckpointError."""
        try:
            return cls({name: ProjectionError(**error) for name, error in notes["errors"].items()}, notes["repacked"])
        except (KeyError, TypeError, AttributeError):
            raise CheckpointError(f"what was noted of layer {layer} is damaged: convert it again") from None


def together(packings: Iterable[LayerPacking]) -> dict[str, ProjectionError]:
    """The errors of all layers."""
    found: dict[str, ProjectionError] = {}
    for packing in packings:
        for projection, error in packing.errors.items():
            found.setdefault(projection, ProjectionError()).include(error)
    return found


@dataclass(slots=True)
class LinearErrors:
    """Relative reconstruction error ||W - packed(W)|| / ||W|| over packed linear layers."""

    mean: float = 0.0
    worst: float = 0.0
    worst_name: str = ""
    count: int = 0

    def add(self, name: str, error: float) -> None:
        self.count += 1
        self.mean += (error - self.mean) / self.count
        if error > self.worst or self.count == 1:
            self.worst, self.worst_name = error, name


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """source_bytes and packed_bytes count the experts alone, rest_source_bytes and rest_bytes every other tensor;
    linear_bytes those of the rest that are packed linear layers, linear_errors theirs, None where there are none.
    errors by projection, 0 where codes and scales were kept. sources: the formats that the experts were in, None for
    plain ones; own: whether they were packed into those. repacked: matrices whose codes no format holds, so that they
    were packed anew whatever was asked for; odd: in words, which.
    resumed: the layers that an earlier run had finished. read_bytes, seconds: of experts in this run; its time in all.
    """

    source: Path
    output: Path
    formats: ModelFormats
    layers: tuple[int, ...]
    source_bytes: int
    packed_bytes: int
    rest_source_bytes: int
    rest_bytes: int
    seconds: float
    errors: dict[str, ProjectionError]
    sources: tuple[Format | None, ...]
    own: bool
    repacked: int
    linear_bytes: int
    linear_errors: LinearErrors | None
    odd: str
    resumed: tuple[int, ...]
    read_bytes: int

    @property
    def quantised(self) -> tuple[Format, ...]:
        """The formats that the experts were quantised in."""
        return tuple(spec for spec in self.sources if spec is not None)

    @property
    def kept(self) -> bool:
        """Whether all codes are those of the source."""
        return self.own and not self.repacked
