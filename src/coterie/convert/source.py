"""The checkpoint that is converted, opened, and what it is."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from coterie.checkpoints import LayerReader, Reader, open_reader, packed
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.gguf import GgufReader
from coterie.checkpoints.gguf_types import TYPES
from coterie.checkpoints.quantised import METHODS, method_of
from coterie.errors import ArgumentError, CheckpointError
from coterie.formats import FORMATS

PLAIN_TYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
AUTO = "auto"
GGUF = "gguf"
GGUF_TYPES = {name: PLAIN_TYPES.get(name, name.lower()) for name in TYPES}
INPUT_TYPES = tuple(dict.fromkeys((AUTO, *PLAIN_TYPES.values(), *METHODS, GGUF, *FORMATS, *GGUF_TYPES.values())))


def open_source(source: Path) -> Reader:
    """The reader of a model folder or a GGUF file that is not packed yet. Raises ArgumentError, CheckpointError."""
    if packed(source):
        raise ArgumentError(f"{source} is packed already: use the original checkpoint")
    reader = open_reader(source)
    if reader.folder is not None:
        _check_config(source, reader.folder)
    return reader


def rest_of(source: Path, reader: Reader, rest: str | os.PathLike | None = None) -> Folder:
    """The folder that has everything but the experts: `rest`, or else the model folder itself.

    Raises CheckpointError where there is none: a GGUF file has all in names of its own.
    """
    folder = reader.folder if rest is None else Folder(rest)
    if folder is None:
        raise CheckpointError(f"{source} is no Hugging Face folder: convert it by `coterie convert cpu -i {source}`")
    _check_config(source, folder)
    return folder


def check_input_type(asked: str, source: Path, reader: Reader, layers: Iterable[LayerReader]) -> None:
    """Raises ArgumentError unless the experts of a checkpoint are of the type asked for, one of INPUT_TYPES.

    A checkpoint has several: the method that quantised it, as config.json has it, and the format of its codes; a GGUF
    file that it is one, and the types of its tensors.
    """
    if asked not in INPUT_TYPES:
        raise ArgumentError(f"--input-type is {asked!r}: expected one of {', '.join(INPUT_TYPES)}")
    found = _input_types(reader, layers)
    if asked != AUTO and asked not in found:
        raise ArgumentError(
            f"--input-type is {asked}: {source} holds experts in {', '.join(sorted(found))}; leave it out, "
            "or name one of those"
        )


def _input_types(reader: Reader, layers: Iterable[LayerReader]) -> set[str]:
    if isinstance(reader, GgufReader):
        return {GGUF, *(GGUF_TYPES[kind] for kind in reader.types)}
    assert reader.folder is not None
    found = set[str]()
    if (method := method_of(reader.folder)) is not None:
        found.add(method[0])
    for layer in layers:
        for spec in layer.kinds:
            if spec is not None:
                found |= {spec.name, spec.name.partition("_")[0]}  # fp8_block is fp8
        if layer.kinds == (None,):
            dtypes = (reader.folder.file_of(name).entry(name).dtype for name in layer.tensors)
            found.update(PLAIN_TYPES[dtype] for dtype in dtypes if dtype in PLAIN_TYPES)
    return found


def _check_config(source: Path, folder: Folder) -> None:
    if not folder.config:
        raise CheckpointError(f"{source} is not a model folder: it has no config.json")
