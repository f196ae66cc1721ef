"""A quantised checkpoint as a plain one in bf16: experts and everything else, a matrix at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from coterie.checkpoints import packed
from coterie.checkpoints.folder import INDEX, Folder
from coterie.checkpoints.folderwriter import new_folder, replaced_folder
from coterie.checkpoints.quantised import check_quantised, without_quantisation
from coterie.checkpoints.tensorwriter import check_room, path_within, write_error
from coterie.convert.progress import Meter, Progress
from coterie.convert.rest import copy_files, other_files, write_index, write_json, write_shard
from coterie.convert.tensors import AnyTensor, written_tensors
from coterie.errors import ArgumentError, CheckpointError

DTYPE = "BF16"


@dataclass(frozen=True, slots=True)
class Dequantized:
    """What was written. matrices: weights that were dequantised; whole: whether the checkpoint is complete."""

    files: tuple[str, ...]
    matrices: int
    source_bytes: int
    bytes: int
    seconds: float
    whole: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint as it is to be written: its tensors, by the files that they go into, read from `folder`, where they
    need one; config.json, which is made plain, and the folder of the other files."""

    shards: Mapping[str, Sequence[AnyTensor]]
    folder: Folder | None
    config: dict[str, Any]
    root: Path


def dequantize(
    source: str | os.PathLike,
    output: str | os.PathLike,
    files: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    opened: Opened | None = None,
) -> Dequantized:
    """Writes the quantised checkpoint folder `source` to `output`, every weight that is quantised in bf16.

    `opened`: what is there, where it is no such checkpoint: `coterie.hf.converting.dequantize` opens GGUF files.
    What is plain is copied. Each file of tensors keeps its name. A matrix is in memory at a time, of a stack one
    expert's. `files` None: all of them, into a new folder, which appears whole or not at all; `overwrite` lets it
    replace a checkpoint. Else only those files, each whole or not there; `overwrite` replaces those that are there.
    When the last of all files is there, config.json, the index and the other files follow.

    Raises ArgumentError for a source that is not quantised or a folder that is in use, CheckpointError for a broken
    source and for an output that cannot be written.
    """
    started = time.perf_counter()
    source, output = Path(source), Path(output)
    found = opened or open_folder(source)
    if output.exists() and output.samefile(source):
        raise ArgumentError(f"output {output} is the source: choose another folder")
    shards = found.shards
    chosen = {name: shards[name] for name in _chosen(files, shards, output, overwrite)}
    needed = sum(tensor.nbytes for shard in chosen.values() for tensor in shard)

    with _opened(output, files is None, overwrite, needed) as new:
        check_room(new, needed)
        meter = Meter(progress, len(chosen), needed)
        for part, (name, shard) in enumerate(chosen.items(), 1):
            write_shard(found.folder, shard, path_within(new, name), partial(meter.add, part, len(shard)))
        whole = all((new / name).exists() for name in shards)
        if whole:
            _finish(found, new)
    return Dequantized(
        files=tuple(chosen),
        matrices=sum(tensor.quantised for shard in chosen.values() for tensor in shard),
        source_bytes=sum(tensor.source_nbytes(found.folder) for shard in chosen.values() for tensor in shard),
        bytes=needed,
        seconds=time.perf_counter() - started,
        whole=whole,
    )


def open_folder(source: Path) -> Opened:
    """A quantised checkpoint in a folder. Raises ArgumentError for what is none, CheckpointError for a broken one."""
    if packed(source):
        raise ArgumentError(f"{source} is packed by coterie: dequantise the checkpoint that it was made from")
    folder = Folder(source)
    if not folder.config:
        raise CheckpointError(f"{source} is not a model folder: it has no config.json")
    tensors = written_tensors(folder, folder.shard_of, check_quantised(folder), DTYPE)
    if not any(tensor.quantised for tensor in tensors):
        raise ArgumentError(f"{source} is not quantised: there is nothing to dequantise")
    shards: dict[str, list[AnyTensor]] = {}
    for tensor in tensors:
        shards.setdefault(folder.shard_of[tensor.source], []).append(tensor)
    return Opened(shards, folder, folder.config, folder.root)


def _chosen(
    files: Sequence[str] | None, shards: Mapping[str, Sequence[AnyTensor]], output: Path, overwrite: bool
) -> Sequence[str]:
    """The files to be written. Raises ArgumentError for one that the source has not, or that is there already."""
    if files is None:
        return sorted(shards)
    unknown = sorted(set(files) - shards.keys())
    if unknown or not files:
        asked = f"{unknown[0]} is no file of tensors of the source" if unknown else "no files were asked for"
        raise ArgumentError(f"--files: {asked}; it has {', '.join(sorted(shards))}")
    there = [name for name in files if (output / name).exists()]
    if there and not overwrite:
        raise ArgumentError(f"{output / there[0]} is there already: leave it out of --files, or give --overwrite")
    return sorted(set(files))


def _opened(output: Path, all_files: bool, overwrite: bool, needed: int) -> AbstractContextManager[Path]:
    """The folder to write to while the block runs."""
    if not all_files:
        return _any_folder(output)
    return replaced_folder(output, needed) if overwrite else new_folder(output)


@contextmanager
def _any_folder(path: Path) -> Iterator[Path]:
    """A folder, made where there is none, whatever it holds."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path, error) from error
    yield path


def _finish(found: Opened, output: Path) -> None:
    """Writes what makes a checkpoint of files of tensors, the index last."""
    file = partial(path_within, output)
    copy_files(found.root, other_files(found.root), file)
    write_json(file("config.json"), plain_config(found.config))
    weight_map = {tensor.name: name for name, shard in found.shards.items() for tensor in shard}
    write_index(file(INDEX), weight_map, total_size=sum(t.nbytes for shard in found.shards.values() for t in shard))


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json without quantisation, of a model in bf16."""
    plain = without_quantisation(config)
    named = [part for part in (plain, plain.get("text_config")) if isinstance(part, dict)]
    keys = [(part, key) for part in named for key in ("dtype", "torch_dtype") if key in part]
    for part, key in keys or [(plain, "torch_dtype")]:
        part[key] = "bfloat16"
    return plain
