"""A safetensors file opened by mmap, its header checked to the last byte before any tensor is handed out."""

from __future__ import annotations

import json
import math
import mmap
import os
import weakref
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from coterie.errors import CheckpointError, MissingTensorError

MAX_HEADER = 100_000_000
MAX_DIMENSIONS = 64
MAX_EXTENT = 2**62

# dtype name in the file -> (bits of one element, torch dtype or None where torch has none)
DTYPES: dict[str, tuple[int, torch.dtype | None]] = {
    "BOOL": (8, torch.bool),
    "U8": (8, torch.uint8),
    "I8": (8, torch.int8),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E8M0": (8, getattr(torch, "float8_e8m0fnu", None)),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "I16": (16, torch.int16),
    "U16": (16, torch.uint16),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "I32": (32, torch.int32),
    "U32": (32, torch.uint32),
    "F32": (32, torch.float32),
    "I64": (64, torch.int64),
    "U64": (64, torch.uint64),
    "F64": (64, torch.float64),
    "C64": (64, torch.complex64),
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
}
# Of weights that nobody has quantised.
PLAIN_DTYPES = ("BF16", "F16", "F32")


def shown(value: object) -> str:
    """`value` as a file gave it, made fit for an error message: plain ASCII, at most 100 characters."""
    text = ascii(value)
    return text if len(text) <= 100 else text[:97] + "..."


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file: `start` and `stop` are bytes from the beginning of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class TensorFile:
    """The tensors of one safetensors file.

    `entries` maps names to `Entry` in file order, `metadata` is the header's string map, `data_start` the file offset
    of the data section. Views handed out stay valid as long as they live. The file is opened once: header, reads and
    map are of the same file even where another takes its name. At most one descriptor is held for it.

    Raises CheckpointError, naming the file and the tensor, when the file is not exactly what its header promises.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            self._close = weakref.finalize(self, os.close, self._descriptor)
            self.size = os.fstat(self._descriptor).st_size
            with open(self._descriptor, "rb", closefd=False) as file:
                self.data_start, header = _read_header(self.path, file, self.size)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}") from error
        self.metadata = _metadata(self.path, header.pop("__metadata__", {}))
        self.entries = _entries(self.path, header, self.size - self.data_start)

    @cached_property
    def _map(self) -> mmap.mmap:
        # Private and never written: the pages are those of the page cache, shared between processes.
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
        try:
            mapped = mmap.mmap(self._descriptor, self.size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot map {self.path}: {error}") from error
        self._close()  # the map holds a descriptor of its own
        return mapped

    def entry(self, name: str) -> Entry:
        """The entry of `name`; raises MissingTensorError."""
        try:
            return self.entries[name]
        except KeyError:
            raise MissingTensorError(f"{self.path} has no tensor {shown(name)}") from None

    def bytes(self, name: str) -> Tensor:
        """The raw bytes of a tensor: uint8 [nbytes], a view of the mapped file."""
        entry = self.entry(name)
        if entry.nbytes == 0:
            return torch.empty(0, dtype=torch.uint8, device="cpu")
        return torch.frombuffer(self._map, dtype=torch.uint8, count=entry.nbytes, offset=self.data_start + entry.start)

    def tensor(self, name: str) -> Tensor:
        """The tensor in its own shape and dtype: a view of the mapped file, or a copy where its offset is unaligned."""
        entry = self.entry(name)
        dtype = DTYPES[entry.dtype][1]
        if dtype is None:
            raise CheckpointError(f"{self.path}, tensor {shown(name)}: dtype {entry.dtype} cannot be read by torch")
        raw = self.bytes(name)
        if (self.data_start + entry.start) % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(entry.shape)

    def read_into(self, name: str, view: memoryview) -> None:
        """Reads the bytes of a tensor into `view`, which is of its size, without mapping the file."""
        start, done = self.data_start + self.entry(name).start, 0
        if not self._close.alive:
            view[:] = memoryview(self._map)[start : start + len(view)]
            return
        try:
            while done < len(view):
                count = os.preadv(self._descriptor, [view[done:]], start + done)
                if count == 0:
                    raise CheckpointError(f"{self.path} was cut short while tensor {shown(name)} was read")
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error.strerror or error}") from error

    def release(self, name: str, index: int = 0, count: int = 1) -> None:
        """Lets go of the memory of a tensor's pages, of the `index`th of `count` equal pieces of it.

        Views stay valid: touched again, their pages are read again.
        """
        entry = self.entry(name)
        page, piece = mmap.PAGESIZE, entry.nbytes // count
        begin = self.data_start + entry.start + index * piece
        start = -(-begin // page) * page
        stop = (begin + piece) // page * page
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _read_header(path: Path, file, size: int) -> tuple[int, dict]:
    if size < 8:
        raise CheckpointError(f"{path} is not a safetensors file: {size} bytes, shorter than the 8 of a header length")
    length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise CheckpointError(f"{path} is not a safetensors file: header of {length} bytes, at most {MAX_HEADER}")
    if length > size - 8:
        raise CheckpointError(f"{path} is truncated: header of {length} bytes, {size - 8} bytes in the file")
    raw = file.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON: {shown(str(error))}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}, expected an object")
    return 8 + length, header


def _unique(pairs: list[tuple[str, object]]) -> dict:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"duplicate key {name}")
        found[name] = value
    return found


def _metadata(path: Path, found: object) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise CheckpointError(f"{path}: __metadata__ is {shown(found)}, expected an object of strings")
    return found


def _entries(path: Path, header: dict, data_bytes: int) -> dict[str, Entry]:
    entries = sorted((_entry(path, name, value) for name, value in header.items()), key=lambda e: (e.start, e.stop))
    position = 0
    for entry in entries:
        if entry.start != position:
            what = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise CheckpointError(
                f"{path}, tensor {shown(entry.name)}: {what}: starts at byte {entry.start}, expected {position}"
            )
        position = entry.stop
        if position > data_bytes:
            raise CheckpointError(
                f"{path} is truncated in tensor {shown(entry.name)}: it ends at byte {position} of the data, "
                f"the file has {data_bytes}"
            )
    if position != data_bytes:
        raise CheckpointError(f"{path}: the tensors take {position} bytes, the file has {data_bytes} bytes of data")
    return {entry.name: entry for entry in entries}


def _entry(path: Path, name: str, value: object) -> Entry:
    def bad(expected: str, found: object) -> CheckpointError:
        return CheckpointError(f"{path}, tensor {shown(name)}: expected {expected}, found {shown(found)}")

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise bad("an object of dtype, shape and data_offsets", value)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"a dtype of {', '.join(DTYPES)}", dtype)
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_extent(n) for n in shape):
        raise bad(f"a shape of at most {MAX_DIMENSIONS} sizes", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_extent(n) for n in offsets):
        raise bad("data_offsets of two byte positions", offsets)
    start, stop = offsets
    bits = math.prod(shape) * DTYPES[dtype][0]
    if bits % 8 or stop - start != bits // 8:
        raise bad(f"{bits / 8 if bits % 8 else bits // 8} bytes for {dtype} {shape}", f"{stop - start} bytes")
    return Entry(name, dtype, tuple(shape), start, stop)


def _extent(value: object) -> bool:
    return type(value) is int and 0 <= value < MAX_EXTENT
