"""Packed linear layers (docs/format.md): the files that they lie in, what those hold, how they are read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coterie.checkpoints.packed import VERSION, Metadata, check_tensors, check_version, format_metadata
from coterie.checkpoints.tensorfile import TensorFile, shown
from coterie.checkpoints.tensorwriter import TensorWriter
from coterie.errors import ArgumentError, CheckpointError
from coterie.formats import EXPERT_ALIGN, Format, round_up

LINEARS_FILE = re.compile(r"linears-\d{5}\.safetensors")
FILE_BYTES = 5 << 30
SHAPES = "coterie.shapes"
LARGEST = 999_999_999
Shapes = Mapping[str, tuple[int, int]]  # a weight's name -> its rows and columns


@dataclass(frozen=True, slots=True)
class PackedLinears:
    """What a file of packed linear layers is: all that its metadata says."""

    spec: Format
    shapes: Shapes

    def nbytes(self, name: str) -> int:
        """Bytes of a packed weight, and of what fills its last page."""
        return round_up(self.spec.matrix_nbytes(*self.shapes[name]), EXPERT_ALIGN)

    def tensors(self) -> Iterator[tuple[str, str, tuple[int]]]:
        """(name, dtype, shape) of every tensor in file order."""
        for name in self.shapes:
            yield name, "U8", (self.nbytes(name),)

    def metadata(self) -> dict[str, str]:
        return {
            "format": "pt",
            "coterie.version": VERSION,
            **format_metadata("coterie.linears", self.spec),
            SHAPES: json.dumps({name: list(shape) for name, shape in self.shapes.items()}),
        }


@dataclass(frozen=True, slots=True)
class LinearsFile:
    """A file of packed linear layers, found to hold exactly what `layout` says."""

    file: TensorFile
    layout: PackedLinears

    def mapped(self, name: str) -> Tensor:
        """The bytes of a packed weight, uint8, where they lie in the file's own pages."""
        entry = self.file.entry(name)
        if (self.file.data_start + entry.start) % EXPERT_ALIGN:
            raise CheckpointError(
                f"{self.file.path}, tensor {shown(name)}: not {EXPERT_ALIGN}-byte aligned, so it cannot be used where "
                "it lies; open it with mmap=False"
            )
        return self.file.bytes(name)

    def read_into(self, name: str, memory: Tensor) -> None:
        """Reads the same bytes into a uint8 tensor of exactly their size."""
        self.file.read_into(name, memory.numpy().data)


def open_linears(paths: Iterable[Path]) -> dict[str, LinearsFile]:
    """The file of each packed linear layer, by the name of its weight. Raises CheckpointError where one is broken."""
    found: dict[str, LinearsFile] = {}
    for path in paths:
        file = TensorFile(path)
        opened = LinearsFile(file, read_linears(file))
        for name in opened.layout.shapes:
            if name in found:
                raise CheckpointError(f"tensor {shown(name)} is in both {found[name].file.path} and {path}")
            found[name] = opened
    return found


def read_linears(file: TensorFile) -> PackedLinears:
    """What a file of packed linear layers holds, after checking that it holds exactly that. Raises CheckpointError."""
    get = Metadata(file, "a file of packed linear layers")
    check_version(get)
    layout = PackedLinears(get.spec("coterie.linears"), _shapes(get))
    try:
        for name, (_, columns) in layout.shapes.items():
            layout.spec.check_columns(shown(name), columns)
    except ArgumentError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    if len(file.entries) != len(layout.shapes):
        raise CheckpointError(f"{file.path}: {len(file.entries)} tensors, {SHAPES} names {len(layout.shapes)}")
    check_tensors(file, layout.tensors())
    return layout


def _shapes(get: Metadata) -> dict[str, tuple[int, int]]:
    try:
        found = json.loads(get.text(SHAPES))
    except (ValueError, RecursionError) as error:
        raise get.bad(SHAPES, "JSON") from error
    if not isinstance(found, dict) or not found:
        raise get.bad(SHAPES, "an object that names the packed weights")
    for shape in found.values():
        sizes = shape if isinstance(shape, list) and len(shape) == 2 else [None]
        if not all(type(size) is int and 1 <= size <= LARGEST for size in sizes):
            raise get.bad(SHAPES, f"[rows, columns] of each weight, whole numbers from 1 to {LARGEST}")
    return {name: (rows, columns) for name, (rows, columns) in found.items()}


def write_linears(
    file: Callable[[str], Path], specs: Mapping[str, Format], shapes: Shapes, packed: Callable[[str], Tensor]
) -> dict[str, str]:
    """Writes linear layers packed as `specs` say, one at a time, and returns the file of each: a file has one format.

    file: from the name of a file to its path. packed: from a weight's name to its packed bytes, uint8; it is called
    format by format, in the order of `shapes`. Raises CheckpointError when the system refuses a write.
    """
    weight_map: dict[str, str] = {}
    whole = [
        PackedLinears(spec, {name: shape for name, shape in shapes.items() if specs[name] == spec})
        for spec in dict.fromkeys(specs.values())
    ]
    for number, layout in enumerate(part for each in whole for part in _files(each)):
        name = f"linears-{number:05d}.safetensors"
        with TensorWriter(file(name), layout.tensors(), layout.metadata(), EXPERT_ALIGN) as writer:
            for weight in layout.shapes:
                data = packed(weight)
                writer.write(weight, data)
                writer.write(weight, torch.zeros(layout.nbytes(weight) - len(data), dtype=torch.uint8, device="cpu"))
        weight_map |= dict.fromkeys(layout.shapes, name)
    return weight_map


def _files(whole: PackedLinears) -> Iterator[PackedLinears]:
    """Linear layers of a format, cut into files."""
    part: dict[str, tuple[int, int]] = {}
    size = 0
    for name, shape in whole.shapes.items():
        if part and size + whole.nbytes(name) > FILE_BYTES:
            yield PackedLinears(whole.spec, part)
            part, size = {}, 0
        part[name] = shape
        size += whole.nbytes(name)
    if part:
        yield PackedLinears(whole.spec, part)
