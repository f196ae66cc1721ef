"""What a conversion tells of how far it is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called after each expert of a layer, or tensor of a file: `piece` of `pieces` in `part` of `parts`, all counted
    from 1, and the bytes of weights that are done since the start, of `bytes_total`."""

    def __call__(
        self, part: int, parts: int, piece: int, pieces: int, bytes_done: int, bytes_total: int
    ) -> None: ...
