"""How far a conversion is: bars on a terminal, else a plain line a layer, both on stderr."""

from __future__ import annotations

import time

from rich.progress import BarColumn, Progress, TextColumn

from coterie.cli.console import errors, size


class ConversionProgress:
    """Shows how many parts, and pieces of the one at hand, are done: layers and experts, say. A context manager."""

    def __init__(self, part: str = "layer", piece: str = "expert") -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
        self._bars = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
        self._part, self._piece = part, piece
        self._parts = self._bars.add_task("reading the checkpoint", total=None, said="")
        self._pieces = self._bars.add_task("", total=None, said="", visible=False)
        self._start = time.perf_counter()

    def __enter__(self) -> ConversionProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(
        self, part: int, parts: int, piece: int, pieces: int, bytes_done: int, bytes_total: int
    ) -> None:
        """What conversions call their `progress` with."""
        speed = bytes_done / max(1e-9, time.perf_counter() - self._start)
        left = (bytes_total - bytes_done) / max(1.0, speed)
        said = f"{size(bytes_done)} of {size(bytes_total)}, {size(speed)}/s, {left:.0f} s left"
        title, within = f"{self._part} {part}/{parts}", f"{self._piece} {piece}/{pieces}"
        self._bars.update(self._parts, description=title, total=bytes_total, completed=bytes_done, said=said)
        self._bars.update(self._pieces, description=within, total=pieces, completed=piece, visible=True)
        if piece == pieces and not errors.is_terminal:
            errors.print(f"{title}: {said}", highlight=False, soft_wrap=True)
