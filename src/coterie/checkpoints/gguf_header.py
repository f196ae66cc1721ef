"""The lengths in a GGUF file's header, checked before the gguf package follows them, wherever they lead."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # numbers of types -> bytes
STRING, ARRAY = 8, 9
MOST = 1 << 24  # elements of an array, many more than there are tokens in any vocabulary
DIMENSIONS = 4
OF_A_TENSOR = 12  # bytes: its type, and where it begins


def check_header(path: Path) -> None:
    """Raises ValueError unless metadata and the list of tensors end within the file.

    Of files in the other byte order nothing is checked: they are not read.
    """
    with path.open("rb") as file:
        walk = _Walk(file, path.stat().st_size)
        walk.skip(4)
        if walk.number("I") & 0xFFFF:
            tensors, values = walk.number("Q"), walk.number("Q")
            for _ in range(values):
                walk.string()
                walk.value(walk.number("I"))
            for _ in range(tensors):
                walk.string()
                dimensions = walk.number("I")
                if dimensions > DIMENSIONS:
                    raise ValueError(f"a tensor of {dimensions} dimensions, expected {DIMENSIONS} at most")
                walk.skip(8 * dimensions + OF_A_TENSOR)


class _Walk:
    def __init__(self, file: BinaryIO, size: int):
        self._file, self._size, self._at = file, size, 0

    def skip(self, count: int) -> None:
        self._at += count
        if self._at > self._size:
            raise ValueError(f"the header leads to byte {self._at}, the file has {self._size}")
        self._file.seek(self._at)

    def number(self, kind: str) -> int:
        count = struct.calcsize(kind)
        found = self._file.read(count)
        self.skip(count)
        return struct.unpack(f"<{kind}", found)[0]

    def string(self) -> None:
        self.skip(self.number("Q"))

    def value(self, kind: int) -> None:
        if kind == STRING:
            self.string()
        elif kind in SCALARS:
            self.skip(SCALARS[kind])
        elif kind == ARRAY:
            self._array(self.number("I"), self.number("Q"))
        else:
            raise ValueError(f"a value of type {kind}, expected 0 to 12")

    def _array(self, kind: int, count: int) -> None:
        if count > MOST:
            raise ValueError(f"an array of {count} elements, expected {MOST} at most")
        if kind in SCALARS:
            self.skip(count * SCALARS[kind])
        elif kind == STRING:
            for _ in range(count):
                self.string()
        else:
            raise ValueError(f"an array of elements of type {kind}, expected strings or numbers")
