"""The header of a GGUF file: metadata, of which a value is read when it is asked for, and where the tensors are.

A vocabulary has hundreds of thousands of strings there: they are passed over.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import mmap
from typing import Any

import numpy as np

# Numbers of types -> numpy's.
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
WIDTHS = {kind: np.dtype(name).itemsize for kind, name in SCALARS.items()}
UINT32, STRING, ARRAY = 4, 8, 9
MOST = 1 << 24  # elements of an array, many more than there are tokens in any vocabulary
DIMENSIONS = 4
VERSIONS = (2, 3)
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Value:
    """A metadata value: bytes `begin` to `end`, in the entry that begins with its key at `entry`.

    elements: the type of an array's, of which there are `count`; None and 1 for what is no array.
    """

    kind: int
    entry: int
    begin: int
    end: int
    elements: int | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the header has it. kind: the number of its type; offset: from where the tensors begin."""

    shape: tuple[int, ...]
    kind: int
    offset: int


class Header:
    """The header in a file's bytes. values: by key; tensors: by name; end: where the tensors begin.

    Raises ValueError for one that does not end within the file, or that is not as the format has it.
    """

    def __init__(self, data: mmap):
        self._data = data
        walk = _Walk(data)
        walk.skip(4)
        self.version = walk.number("I")
        if not self.version & 0xFFFF:
            raise ValueError("numbers in the other byte order than this machine's, expected little-endian")
        if self.version not in VERSIONS:
            raise ValueError(f"version {self.version}, expected one of {', '.join(map(str, VERSIONS))}")
        tensors, values = walk.number("Q"), walk.number("Q")
        self.values: dict[str, Value] = {}
        for _ in range(values):
            entry = walk.at
            _add(self.values, walk.string(), walk.value(entry))
        self.tensors: dict[str, Tensor] = {}
        for _ in range(tensors):
            _add(self.tensors, walk.string(), walk.tensor())
        alignment = self.read("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment is {alignment}, expected a power of two")
        self.end = -(-walk.at // alignment) * alignment

    def read(self, key: str, default: Any = None) -> Any:
        """A value, an array as a list; `default` where there is none of that key. Raises ValueError for strings that
        are not UTF-8."""
        value = self.values.get(key)
        if value is None:
            return default
        if value.kind == STRING:
            return str(self._data[value.begin + 8 : value.end], "utf-8")
        if value.kind != ARRAY:
            return np.frombuffer(self._data, SCALARS[value.kind], 1, value.begin)[0].item()
        if value.elements != STRING:
            return np.frombuffer(self._data, SCALARS[value.elements or 0], value.count, value.begin + 12).tolist()
        return [str(self._data[begin:end], "utf-8") for begin, end in self._strings(value)]

    def metadata(self, longest: int, **more: int) -> bytes:
        """A file without tensors of the same metadata, and of `more`. Of arrays of more elements than `longest` it has
        the number of elements instead."""
        entries = []
        for value in self.values.values():
            if value.count > longest:
                key = self._data[value.entry : value.begin - 4]
                entries.append(key + struct.pack("<II", UINT32, value.count))
            else:
                entries.append(self._data[value.entry : value.end])
        for name, number in more.items():
            entries.append(LENGTH.pack(len(name)) + name.encode() + struct.pack("<II", UINT32, number))
        return b"GGUF" + struct.pack("<IQQ", self.version, 0, len(entries)) + b"".join(entries)

    def _strings(self, value: Value) -> Iterator[tuple[int, int]]:
        at = value.begin + 12
        for _ in range(value.count):
            end = at + 8 + LENGTH.unpack_from(self._data, at)[0]
            yield at + 8, end
            at = end


def _add(found: dict[str, Any], name: str, one: Any) -> None:
    if name in found:
        raise ValueError(f"two entries are named {name!r}")
    found[name] = one


class _Walk:
    def __init__(self, data: mmap):
        self._data, self._size, self.at = data, len(data), 0

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > self._size:
            raise ValueError(f"the header leads to byte {self.at}, the file has {self._size}")

    def number(self, kind: str) -> int:
        begin, count = self.at, struct.calcsize(kind)
        self.skip(count)
        return struct.unpack_from(f"<{kind}", self._data, begin)[0]

    def string(self) -> str:
        begin = self.at + 8
        self.skip(self.number("Q"))
        return str(self._data[begin : self.at], "utf-8")

    def value(self, entry: int) -> Value:
        kind, begin, elements, count = self.number("I"), self.at, None, 1
        if kind == STRING:
            self.skip(self.number("Q"))
        elif kind in SCALARS:
            self.skip(WIDTHS[kind])
        elif kind == ARRAY:
            elements, count = self.number("I"), self.number("Q")
            self._elements(elements, count)
        else:
            raise ValueError(f"a value of type {kind}, expected 0 to 12")
        return Value(kind, entry, begin, self.at, elements, count)

    def tensor(self) -> Tensor:
        dimensions = self.number("I")
        if dimensions > DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions, expected {DIMENSIONS} at most")
        shape = tuple(self.number("Q") for _ in range(dimensions))
        return Tensor(shape[::-1], self.number("I"), self.number("Q"))

    def _elements(self, kind: int, count: int) -> None:
        if count > MOST:
            raise ValueError(f"an array of {count} elements, expected {MOST} at most")
        if kind in SCALARS:
            self.skip(count * WIDTHS[kind])
        elif kind == STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        else:
            raise ValueError(f"an array of elements of type {kind}, expected strings or numbers")
