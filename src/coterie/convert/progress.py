"""What a conversion tells of how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called after each expert of a layer, or tensor of a file: `piece` of `pieces` in `part` of `parts`, all counted
    from 1, and the bytes of weights that are done since the start, of `bytes_total`."""

    def __call__(
        self, part: int, parts: int, piece: int, pieces: int, bytes_done: int, bytes_total: int
    ) -> None: ...


class Meter:
    """Counts the bytes that are done of `total`, in that many parts, for a Progress, if there is one."""

    def __init__(self, progress: Progress | None, parts: int, total: int):
        self._progress, self._parts, self._total = progress, parts, total
        self.done = 0

    def add(self, part: int, pieces: int, piece: int, nbytes: int) -> None:
        """`piece` of `pieces` in `part` is done, of that many bytes."""
        self.done += nbytes
        if self._progress is not None:
            self._progress(part, self._parts, piece, pieces, self.done, self._total)
