"""The folder that a conversion writes: empty before, whole after, and nothing that looks whole in between."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from coterie.checkpoints.packed import UNFINISHED
from coterie.checkpoints.tensorwriter import remove_empty, sync_folder, write_error, write_text
from coterie.errors import ArgumentError, CheckpointError


class OutputFolder:
    """A new or empty folder that is marked as unfinished while the block runs. Use it as a context manager.

    Leaving the block without an exception takes the mark away; leaving it with one removes everything that was written.
    A process that is killed leaves the mark, and a folder without index, which nothing loads.
    `needed` is the space in bytes that the conversion will take. Raises ArgumentError when the folder is not empty,
    CheckpointError when it cannot be written or its disk is too small.
    """

    def __init__(self, path: str | os.PathLike, needed: int):
        self.path = Path(path)
        self._needed = needed
        self._written: list[Path] = []

    def __enter__(self) -> OutputFolder:
        self._new = not self.path.exists()
        if not self._new:
            self._refuse_used()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path).free
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            if free < self._needed:
                raise CheckpointError(
                    f"not enough space for {self.path}: the conversion takes {self._needed / 1e6:,.1f} MB, "
                    f"{free / 1e6:,.1f} MB are free"
                )
            write_text(self.file(UNFINISHED), "{}\n")
        except BaseException:
            self._clear()
            raise
        return self

    def file(self, name: str) -> Path:
        """The path of a file about to be written, by its name within the folder; its parents are made."""
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(path.parent, error) from error
        self._written.append(path)
        return path

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: object) -> None:
        if kind is not None:
            self._clear()
            return
        try:
            (self.path / UNFINISHED).unlink()
            sync_folder(self.path)
        except OSError as error:
            raise write_error(self.path / UNFINISHED, error) from error

    def _refuse_used(self) -> None:
        if not self.path.is_dir():
            raise ArgumentError(f"output {self.path} is a file, expected a new or empty folder")
        try:
            used = next(self.path.iterdir(), None)
        except OSError as error:
            raise write_error(self.path, error) from error
        if used is None:
            return
        if (self.path / UNFINISHED).exists():
            raise ArgumentError(
                f"output {self.path} holds an unfinished conversion: delete it, or choose another output"
            )
        raise ArgumentError(f"output {self.path} is not empty (it holds {used.name}): choose a new or empty folder")

    def _clear(self) -> None:
        for path in reversed(self._written):
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self.path).parents[:-1]:
                remove_empty(self.path / folder)
        if self._new:
            remove_empty(self.path)
