"""The folder that a conversion writes: nothing in it looks whole before all of it is, and what is finished stays."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from coterie.checkpoints.folder import read_json
from coterie.checkpoints.folderwriter import lock
from coterie.checkpoints.packed import UNFINISHED
from coterie.checkpoints.tensorwriter import (
    TEMPORARY,
    check_room,
    path_within,
    remove_empty,
    remove_temporaries,
    sync_folder,
    write_error,
    write_text,
)
from coterie.errors import ArgumentError, CheckpointError


class OutputFolder:
    """A new or empty folder that bears a mark while the block runs, with which nothing loads it. A context manager.

    The mark says what `conversion` it is, and which layers are finished. Left without an exception, the mark goes; left
    with one, the layers that are finished stay, marked; where there are none, all that was written goes. A process that
    is killed leaves the mark. `resume` goes on with such a folder, if it is of the same conversion.

    finished: what was noted of each finished layer. Raises ArgumentError where the folder is not empty, is of another
    conversion or in use; CheckpointError where it cannot be written.
    """

    def __init__(self, path: str | os.PathLike, conversion: Mapping[str, object], resume: bool = False):
        self.path = Path(path)
        self.finished: dict[int, dict] = {}
        self._conversion = dict(conversion)
        self._resume = resume
        self._written: list[Path] = []
        self._lock: int | None = None
        self._resumed = False

    def __enter__(self) -> OutputFolder:
        self._new = not self.path.exists()
        if not self._new and not self.path.is_dir():
            raise ArgumentError(f"output {self.path} is a file, expected a new or empty folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path)
            self._resumed = self._read_mark()
            remove_temporaries(self.path)
            self._write_mark()
        except BaseException as error:
            self.__exit__(type(error), error, None)
            if isinstance(error, OSError):
                raise write_error(self.path, error) from error
            raise
        return self

    def file(self, name: str) -> Path:
        """The path of a file about to be written, by its name within the folder; its parents are made."""
        path = path_within(self.path, name)
        self._written.append(path)
        return path

    def check_room(self, needed: int) -> None:
        """Raises CheckpointError unless the disk has room for `needed` bytes, those included that are there."""
        there = sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())
        check_room(self.path, needed - there)

    def finish(self, layer: int, notes: dict) -> None:
        """Says that the file of a layer is whole. `notes`, JSON, are there again when the conversion is resumed."""
        self.finished[layer] = notes
        self._write_mark()

    def drop(self, layers: set[int]) -> None:
        """Says that layers are not finished."""
        self.finished = {layer: notes for layer, notes in self.finished.items() if layer not in layers}
        self._write_mark()

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: object) -> None:
        try:
            if kind is None:
                (self.path / UNFINISHED).unlink()
                sync_folder(self.path)
            elif not (self.finished or self._resumed):
                self._clear()
        except OSError as error:
            raise write_error(self.path / UNFINISHED, error) from error
        finally:
            if self._lock is not None:
                os.close(self._lock)

    def _read_mark(self) -> bool:
        """Takes over what is finished. Whether there was a mark."""
        mark = self.path / UNFINISHED
        used = sorted(path.name for path in self.path.iterdir() if not TEMPORARY.fullmatch(path.name))
        if mark.name not in used:
            if used:
                raise ArgumentError(
                    f"output {self.path} is not empty (it holds {used[0]}): choose a new or empty folder"
                )
            return False
        if not self._resume:
            raise ArgumentError(
                f"output {self.path} holds an unfinished conversion: go on with --resume, delete it, or choose another "
                "output"
            )
        found = read_json(mark).get("conversion")
        if not isinstance(found, dict):
            raise ArgumentError(f"{mark} does not say what is unfinished: delete {self.path} and begin again")
        for key, value in self._conversion.items():
            if found.get(key) != value:
                raise ArgumentError(
                    f"output {self.path} holds an unfinished conversion with {key} {found.get(key)}, this one has "
                    f"{value}: give the same options, or choose another output"
                )
        self.finished = finished_layers(self.path)
        return True

    def _write_mark(self) -> None:
        state = {"conversion": self._conversion, "finished": {str(layer): n for layer, n in self.finished.items()}}
        write_text(self.file(UNFINISHED), json.dumps(state) + "\n")

    def _clear(self) -> None:
        for path in reversed(self._written):
            path.unlink(missing_ok=True)
            for folder in path.relative_to(self.path).parents[:-1]:
                remove_empty(self.path / folder)
        if self._new:
            remove_empty(self.path)


def finished_layers(folder: Path) -> dict[int, dict]:
    """What an unfinished conversion in a folder noted of each layer that it finished; {} where there is none."""
    mark = folder / UNFINISHED
    found = read_json(mark).get("finished") if mark.exists() else None
    if not isinstance(found, dict):
        return {}
    try:
        return {int(layer): dict(notes) for layer, notes in found.items()}
    except (TypeError, ValueError):
        raise CheckpointError(f"{mark} is damaged: delete {folder} and begin again") from None


def _locked(folder: Path) -> int | None:
    """A lock on a folder; None where the file system has none. Raises ArgumentError where another run has it."""
    try:
        return lock(folder)
    except BlockingIOError:
        raise ArgumentError(f"another conversion is writing {folder}: wait for it, or choose another output") from None
    except OSError:
        return None
