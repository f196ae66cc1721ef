"""What `coterie convert cpu` would write, and about how long it would take."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from coterie.checkpoints import LayerReader
from coterie.checkpoints.packed_formats import ModelFormats
from coterie.experts import Experts
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
    anatomy: Anatomy,
    formats: ModelFormats,
    packing: float,
    disk: float = DISK,
    dense: Dense | None = None,
    stored: int | None = None,
) -> Conversion:
    """A checkpoint of `stored` bytes, by default one in bf16, packed as `formats`, and its linear layers as `dense`
    says; `packing` bytes of experts, counted in bf16, a second, `disk` bytes read or written."""
    experts = 2 * anatomy.expert_parameters
    read = experts + anatomy.rest_nbytes if stored is None else stored
    written = anatomy.experts_nbytes(formats) + anatomy.rest_nbytes
    written -= dense.saved if dense else 0
    return Conversion(read, written, (read + written) / disk + experts / packing)


def keeping_rate(experts: Mapping[int, LayerReader], formats: ModelFormats) -> float:
    """Bytes of quantised experts, counted in bf16, that are packed in a second with the codes that they have: measured
    on one of them, which is in memory by then."""
    number, layer = next(iter(experts.items()))
    sizes = layer.hidden_size, layer.intermediate_size
    one = Experts.empty(1, *sizes, format=formats[number], activation=layer.activation, has_gate=layer.has_gate)
    for _ in range(2):
        start = time.perf_counter()
        weights = layer.expert(0)
        for name, weight in weights.items():
            one.pack_stored(name, 0, weight)
        seconds = time.perf_counter() - start
    layer.release(0)
    return 2 * len(weights) * layer.hidden_size * layer.intermediate_size / seconds
