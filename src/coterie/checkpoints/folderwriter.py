"""Folders that appear whole or not at all: a new one by one rename, one in the place of an older checkpoint by several.

Both are written to a scratch folder first, which is locked while its run lasts. The system lets go of a lock however
the process ends: so the next run tells what a killed one left from what another is writing.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from coterie.checkpoints.folder import INDEX, SINGLE
from coterie.checkpoints.packed import FILE_NAME, UNFINISHED
from coterie.checkpoints.packed_linears import LINEARS_FILE
from coterie.checkpoints.tensorwriter import (
    check_room,
    remove_empty,
    sync_folder,
    sync_tree,
    write_error,
    write_text,
)
from coterie.errors import ArgumentError, CheckpointError

SAVING = "coterie-saving-"
RUN = r"\d+-[0-9a-f]{8}"
WEIGHTS = (re.compile(r"model-\d{5}-of-\d{5}\.safetensors"), FILE_NAME, LINEARS_FILE)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to write to that becomes `output` when the block is left, and vanishes when it raises.

    Raises ArgumentError where `output` is neither new nor empty, CheckpointError when the system refuses a write.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ArgumentError(f"{output} is not empty; give a new folder")
    with _scratch(output.parent, f".{output.name}.", ".partial", output) as new, _filled(new, output):
        yield new
        sync_tree(new)
        if output.exists():
            output.rmdir()
        os.replace(new, output)
        sync_folder(output.parent)


@contextmanager
def replaced_folder(folder: Path, needed: int) -> Iterator[Path]:
    """A new folder within `folder`, whose files replace those of the checkpoint there when the block is left.

    Left with an exception, the checkpoint that was there is as it was. Its files are deleted last, and memory mapped
    from them stays valid. While files are being renamed the folder holds the mark of an unfinished one; should that be
    interrupted, every new file is whole, in `folder` already or in the new folder still, until another save is whole.
    needed: the bytes that the files will take. Raises CheckpointError where they do not fit or cannot be written.
    """
    existed = folder.exists()
    with _scratch(folder, SAVING, "", folder) as new:
        try:
            with _filled(new, folder):
                check_room(folder, needed)
                yield new
                write_text(new / UNFINISHED, json.dumps({"new files": new.name}) + "\n")
                names = sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file())
                sync_tree(new)
        except BaseException:
            if not existed:
                remove_empty(folder)
            raise
        try:
            _switch(folder, new, names)
        except OSError as error:
            raise CheckpointError(
                f"cannot finish {folder}: {error.strerror or error}. The new files are whole: move those still in "
                f"{new} to {folder}, then delete {folder / UNFINISHED}"
            ) from error
        _remove_abandoned(folder, SAVING, "")


def _switch(folder: Path, new: Path, names: list[str]) -> None:
    """Moves the new files to their places, the mark first; then deletes what is left of the older checkpoint."""
    for name in sorted(names, key=lambda name: name != UNFINISHED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, folder / name)
        if name == UNFINISHED:
            sync_folder(folder)
    sync_folder(folder)
    for file in list(folder.iterdir()):
        of_checkpoint = file.name in (SINGLE, INDEX) or any(name.fullmatch(file.name) for name in WEIGHTS)
        if of_checkpoint and file.name not in names:
            file.unlink()
    (folder / UNFINISHED).unlink()
    shutil.rmtree(new)
    sync_folder(folder)


@contextmanager
def _scratch(parent: Path, prefix: str, suffix: str, output: Path) -> Iterator[Path]:
    """A new folder in `parent`, locked while the block runs. What killed runs left there half written is removed."""
    new = parent / f"{prefix}{os.getpid()}-{secrets.token_hex(4)}{suffix}"
    unlocked = new.with_name(f".{new.name}.new")  # which no other run takes for an abandoned one
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent, prefix, suffix, half_written=True)
        unlocked.mkdir()
        locked = _lock(unlocked)
        os.rename(unlocked, new)
    except OSError as error:
        raise write_error(output, error) from error
    try:
        yield new
    finally:
        if locked is not None:
            os.close(locked)


@contextmanager
def _filled(new: Path, output: Path) -> Iterator[None]:
    """Removes the folder `new` when the block raises. What the system refuses is a CheckpointError about `output`."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if isinstance(error, OSError):
            raise write_error(output, error) from error
        if isinstance(error, SafetensorError):
            raise CheckpointError(f"cannot write {output}: {error}") from error
        raise


def _remove_abandoned(parent: Path, prefix: str, suffix: str, half_written: bool = False) -> None:
    """Removes the scratch folders in `parent` whose runs have ended, or only those that are not whole.

    Where the file system has no locks, all stay.
    """
    name = re.compile(f"{re.escape(prefix)}{RUN}{re.escape(suffix)}")
    try:
        found = [parent / entry for entry in os.listdir(parent) if name.fullmatch(entry)]
    except PermissionError:  # a folder that may be written but not listed
        return
    for folder in found:
        if half_written and any((place / UNFINISHED).exists() for place in (folder, parent)):
            continue
        locked = _lock(folder)
        if locked is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(locked)


def _lock(folder: Path) -> int | None:
    """Locks a folder; None where another run has it, or there are no locks."""
    with suppress(OSError):
        return lock(folder)
    return None


def lock(folder: Path) -> int:
    """Locks a folder until the descriptor is closed.

    Raises BlockingIOError where another run has it, another OSError where the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
