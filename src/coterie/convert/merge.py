"""Loose packed layers put together: with the rest of their original, a packed checkpoint."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coterie.checkpoints import TensorFile
from coterie.checkpoints.folder import PACKED_INDEX
from coterie.checkpoints.folderwriter import new_folder
from coterie.checkpoints.packed import UNFINISHED, PackedLayer, layer_file, read_layout
from coterie.checkpoints.packed_formats import ModelFormats
from coterie.checkpoints.reader import LayerReader, spans
from coterie.checkpoints.tensorwriter import check_room, copy_file, path_within
from coterie.convert.loose import loose_files
from coterie.convert.rest import Rest, write_index
from coterie.convert.source import open_source, rest_of
from coterie.errors import ArgumentError, CheckpointError


@dataclass(frozen=True, slots=True)
class Merged:
    """What was written. whole: with the rest of the original, so that it is a model."""

    layers: tuple[int, ...]
    formats: ModelFormats
    bytes: int
    seconds: float
    whole: bool


def merge(
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    original: str | os.PathLike | None = None,
    max_tensors: int | None = None,
    rest: str | os.PathLike | None = None,
) -> Merged:
    """Copies the packed layers in the folders `inputs` into one new folder with an index, whole or not there at all.

    With `original`, the checkpoint that they were packed from, everything else of it comes along, in shards of at most
    `max_tensors` tensors (`rest` is as of `convert_cpu`); without it, the result is experts alone, which `Experts.open`
    opens. An experts' file stays what it is.

    Raises ArgumentError for layers that are missing or there twice, CheckpointError for broken or unfinished ones and
    for an output that cannot be written.
    """
    started = time.perf_counter()
    output = Path(output)
    files = _found([Path(folder) for folder in inputs])
    layouts = {layer: read_layout(TensorFile(path)) for layer, path in files.items()}
    for layer, layout in layouts.items():
        if layout.layer != layer:
            raise CheckpointError(f"{files[layer]} holds layer {layout.layer}, its name says {layer}")
    formats = ModelFormats.of({layer: layout.formats for layer, layout in layouts.items()})
    others = None
    if original is not None:
        reader = open_source(Path(original))
        readers = {layer: reader.layer(layer) for layer in reader.layers}
        _check_original(Path(original), readers, layouts, files)
        experts = {name for r in readers.values() for name in r.tensors}
        others = Rest(rest_of(Path(original), reader, rest), experts, reader.schemes)
    elif max_tensors is not None:
        raise ArgumentError("--max-tensors is of the rest of a checkpoint: give --original-path")
    with new_folder(output) as new:
        check_room(new, sum(path.stat().st_size for path in files.values()) + (others.nbytes if others else 0))
        for layer, path in files.items():
            copy_file(path, layer_file(new, layer))
        if others is not None:
            others.copy(formats, layouts.values(), partial(path_within, new), max_tensors)
        else:
            weight_map = {
                name: layer_file("", layer).name for layer, layout in layouts.items() for name, _, _ in layout.tensors()
            }
            write_index(new / PACKED_INDEX, weight_map, total_size=sum(layout.nbytes for layout in layouts.values()))
        nbytes = sum(path.stat().st_size for path in new.rglob("*") if path.is_file())
    return Merged(tuple(files), formats, nbytes, time.perf_counter() - started, others is not None)


def _found(folders: Sequence[Path]) -> dict[int, Path]:
    """The file of each layer in all folders."""
    found: dict[int, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder: expected one of packed layers")
        if (folder / UNFINISHED).exists():
            raise CheckpointError(
                f"{folder} is an unfinished conversion ({UNFINISHED} is there): finish it with `coterie convert cpu "
                "--resume`"
            )
        for layer, path in loose_files(folder).items():
            if layer in found:
                raise ArgumentError(f"layer {layer} is in both {found[layer]} and {path}: leave one of them out")
            found[layer] = path
    if not found:
        raise CheckpointError(
            f"{', '.join(map(str, folders))}: no packed layers found; the names tried: experts-NNNNN.safetensors, "
            "there and in folders below, such as _layer_N/_numa_0"
        )
    return dict(sorted(found.items()))


def _check_original(
    original: Path, readers: Mapping[int, LayerReader], layouts: Mapping[int, PackedLayer], files: Mapping[int, Path]
) -> None:
    """Raises ArgumentError unless the layers are all those of the original, and of its sizes."""
    missing, strange = readers.keys() - layouts.keys(), layouts.keys() - readers.keys()
    if missing:
        raise ArgumentError(
            f"layers {spans(tuple(sorted(missing)))} of {original} are not there, only {spans(tuple(layouts))}: "
            "convert them with --layers"
        )
    if strange:
        raise ArgumentError(f"{original} has no experts in layers {spans(tuple(sorted(strange)))}, which are there")
    for layer, reader in readers.items():
        for part in ("num_experts", "hidden_size", "intermediate_size", "has_gate", "biased", "activation"):
            found, expected = getattr(layouts[layer], part), getattr(reader, part)
            if found != expected:
                raise ArgumentError(
                    f"{files[layer]} was not packed from {original}: {part} is {found}, expected {expected}"
                )
