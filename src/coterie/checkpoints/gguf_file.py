"""A GGUF file, or all files of a model that is split into several: metadata, and tensors by name, mapped."""

from __future__ import annotations

import math
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coterie.checkpoints.gguf_header import Header
from coterie.checkpoints.tensorfile import shown
from coterie.errors import CheckpointError, MissingTensorError

MAGIC = b"GGUF"
# Types of tensors that are numbers -> numpy's; others are bytes.
NUMBERS = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
SEEING = "mmproj"  # in the name of a file beside a model: what makes its inputs of images or sounds
SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a path is a GGUF file, judged by its first bytes."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


def find_gguf(path: str | os.PathLike) -> Path | None:
    """The GGUF file at a path: that file itself, or the only GGUF model, in one piece or several, of a folder that has
    no safetensors files, what a model sees with left out. None where there is none; raises CheckpointError, naming
    them, where a folder has several."""
    path = Path(path)
    if not path.is_dir():
        return path if is_gguf(path) else None
    if any(path.glob("*.safetensors")):
        return None
    found = list(dict.fromkeys(file_names(file.name)[0] for file in sorted(path.glob("*.gguf"))))
    found = [name for name in found if SEEING not in name.lower()] or found
    if len(found) > 1:
        raise CheckpointError(
            f"{path} holds {len(found)} GGUF models, expected one: give the path of a file, {', '.join(found[:4])}"
            f"{', ...' if len(found) > 4 else ''}"
        )
    return path / found[0] if found else None


def gguf_package() -> Any:
    """The `gguf` package. Raises CheckpointError, saying how to install it, where it is not there."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "reading GGUF files needs the gguf package: pip install 'coterie[gguf]', or pip install gguf"
        ) from error
    return gguf


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: `nbytes` bytes from `begin` on in a mapped file. type: one of the gguf package's."""

    data: mmap.mmap
    type: Any
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class GgufFile:
    """The tensors of a GGUF model. `path` may be any of its files; metadata is that of the first.

    Raises CheckpointError, naming the file, for one that is broken, of the other byte order, or one of a split model
    whose other files are missing.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        opened = [_open(file) for file in _files(self.path)]
        self._header = opened[0][0]
        self._tensors = {name: tensor for _, tensors in opened for name, tensor in tensors.items()}
        count = sum(len(tensors) for _, tensors in opened)
        stated = self.value("split.tensors.count", count)
        if len(self._tensors) != stated:
            raise CheckpointError(f"{self.path}: {len(self._tensors)} tensors, the metadata says {stated}")

    def __deepcopy__(self, memo: dict) -> GgufFile:
        """Copies of a config that holds one share it: it is never written."""
        return self

    @property
    def first(self) -> Path:
        """The file that has the metadata."""
        return _files(self.path)[0]

    @property
    def architecture(self) -> str:
        return str(self.value("general.architecture", "unnamed"))

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value, or `default` where there is none of that key. Raises CheckpointError for a broken one."""
        try:
            return self._header.read(key, default)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: the metadata's {shown(key)} cannot be read: {error}") from error

    def count(self, key: str) -> int | None:
        """How many elements a metadata array has; None where there is none of that key."""
        value = self._header.values.get(key)
        return None if value is None else value.count

    def own_keys(self, stem: str) -> list[str]:
        """The keys, without the architecture's name, that are the architecture's own and begin so."""
        prefix = f"{self.architecture}."
        own = [key.removeprefix(prefix) for key in self._header.values if key.startswith(prefix)]
        return [key for key in own if key.startswith(stem)]

    def own_value(self, key: str, default: Any = None) -> Any:
        """The value of a key that is the architecture's own: "block_count", say."""
        return self.value(f"{self.architecture}.{key}", default)

    def metadata(self, longest: int, **more: int) -> bytes:
        """A file of the metadata alone, without long arrays: see `Header.metadata`."""
        return self._header.metadata(longest, **more)

    def type(self, name: str) -> str:
        """The name of a tensor's type, "Q4_K" say."""
        return self._tensor(name).type.name

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, columns last."""
        return self._tensor(name).shape

    def nbytes(self, name: str) -> int:
        return self._tensor(name).nbytes

    def block_bytes(self, name: str) -> int:
        """Bytes of a block of a tensor that is stored in blocks."""
        return gguf_package().GGML_QUANT_SIZES[self._tensor(name).type][1]

    def data(self, name: str, index: int | slice | None = None) -> np.ndarray:
        """A tensor, or number `index`, or some, along its first dimension, as stored: uint8 [..., rows, bytes] for
        blocks and bf16, else numbers. A view of the mapped file."""
        stored = self._tensor(name)
        dtype, shape = np.dtype(NUMBERS.get(stored.type.name, np.uint8)), stored.shape
        if stored.type.name not in NUMBERS:
            columns, nbytes = gguf_package().GGML_QUANT_SIZES[stored.type]
            shape = (*shape[:-1], shape[-1] // columns * nbytes)
        data = np.frombuffer(stored.data, dtype, stored.nbytes // dtype.itemsize, stored.begin).reshape(shape)
        return data if index is None else data[index]

    def dequantize(self, name: str, index: int | slice | None = None) -> np.ndarray:
        """The same in float32, by the gguf package's own rules."""
        return gguf_package().quants.dequantize(self.data(name, index), self._tensor(name).type)

    def release(self, name: str, index: int = 0, count: int = 1) -> None:
        """Lets go of the memory of a tensor's pages, of the `index`th of `count` equal pieces of it."""
        stored = self._tensor(name)
        piece = stored.nbytes // count
        begin = stored.begin + index * piece
        start = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (begin + piece) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > start:
            stored.data.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def _tensor(self, name: str) -> Stored:
        try:
            return self._tensors[name]
        except KeyError:
            raise MissingTensorError(f"{self.path} has no tensor {shown(name)}") from None


def file_names(name: str) -> list[str]:
    """The names of all files of a model, in order, by that of any of them."""
    match = SHARD.fullmatch(name)
    if match is None:
        return [name]
    return [f"{match['stem']}-{n:05d}-of-{match['count']}.gguf" for n in range(1, int(match["count"]) + 1)]


def _files(path: Path) -> list[Path]:
    """The files of a model, in order. Raises CheckpointError where some are missing."""
    files = [path.with_name(name) for name in file_names(path.name)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of the {len(files)} files of this model are missing: {', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}"
        )
    return files


def _open(path: Path) -> tuple[Header, dict[str, Stored]]:
    """The header of one file, and its tensors, none of which goes beyond its end."""
    package = gguf_package()
    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        header = Header(data)
        tensors = {}
        for name, tensor in header.tensors.items():
            kind = package.GGMLQuantizationType(tensor.kind)
            columns, block = package.GGML_QUANT_SIZES[kind]
            if not tensor.shape or tensor.shape[-1] % columns:
                raise ValueError(f"tensor {name}: shape {list(tensor.shape)}, {kind.name} has blocks of {columns}")
            begin, nbytes = header.end + tensor.offset, math.prod(tensor.shape) // columns * block
            if begin + nbytes > len(data):
                raise ValueError(f"tensor {name} ends at byte {begin + nbytes}, the file has {len(data)}")
            tensors[name] = Stored(data, kind, tensor.shape, begin, nbytes)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not a whole GGUF file: {shown(str(error))}") from error
    return header, tensors
