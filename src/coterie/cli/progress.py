"""How far a conversion is: bars on a terminal, else a plain line a layer, both on stderr."""

from __future__ import annotations

import time

from rich.progress import BarColumn, Progress, TextColumn

from coterie.cli.console import errors, size


class ConversionProgress:
    """Shows what convert_cpu reports. A context manager."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[said]}"))
        self._bars = Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal)
        self._layers = self._bars.add_task("reading the checkpoint", total=None, said="")
        self._experts = self._bars.add_task("", total=None, said="", visible=False)
        self._start = time.perf_counter()

    def __enter__(self) -> ConversionProgress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def __call__(
        self, layer: int, layers: int, expert: int, experts: int, bytes_done: int, bytes_total: int
    ) -> None:
        speed = bytes_done / max(1e-9, time.perf_counter() - self._start)
        left = (bytes_total - bytes_done) / max(1.0, speed)
        said = f"{size(bytes_done)} of {size(bytes_total)}, {size(speed)}/s, {left:.0f} s left"
        title = f"layer {layer}/{layers}"
        self._bars.update(self._layers, description=title, total=bytes_total, completed=bytes_done, said=said)
        title = f"expert {expert}/{experts}"
        self._bars.update(self._experts, description=title, total=experts, completed=expert, visible=True)
        if expert == experts and not errors.is_terminal:
            errors.print(f"layer {layer}/{layers}: {said}", highlight=False, soft_wrap=True)
