"""What `coterie convert cpu` would write, and about how long it would take."""

from __future__ import annotations

from dataclasses import dataclass

from coterie.checkpoints.packed_formats import ModelFormats
from coterie.plan.anatomy import Anatomy
from coterie.plan.dense import Dense

DISK = 500e6  # bytes per second that are read or written, where nothing better is known


@dataclass(frozen=True, slots=True)
class Conversion:
    """Bytes read and written, and an estimate of the seconds: reading, packing and writing, one after the other."""

    read: int
    written: int
    seconds: float


def conversion(
    anatomy: Anatomy, formats: ModelFormats, packing: float, disk: float = DISK, dense: Dense | None = None
) -> Conversion:
    """A bf16 checkpoint packed as `formats`, and its linear layers as `dense` says; `packing` bytes of bf16 experts a
    second, `disk` bytes read or written."""
    experts = 2 * anatomy.expert_parameters
    read, written = experts + anatomy.rest_nbytes, anatomy.experts_nbytes(formats) + anatomy.rest_nbytes
    written -= dense.saved if dense else 0
    return Conversion(read, written, (read + written) / disk + experts / packing)
