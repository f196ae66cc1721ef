"""A safetensors file written piece by piece, in any order, that appears whole or not at all."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from coterie.checkpoints.tensorfile import DTYPES
from coterie.errors import CheckpointError

CHUNK = 64 << 20
TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")


def write_error(path: str | os.PathLike, error: OSError) -> CheckpointError:
    """The one-line error for a write that the system refused."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    advice = "free some space, or choose another output" if full else "choose an output that can be written"
    return CheckpointError(
        f"cannot write {os.fspath(path)}: {error.strerror or error}. Nothing was left that looks whole; {advice}"
    )


class TensorWriter:
    """Writes one safetensors file of a layout known beforehand. Use it as a context manager.

    `tensors` are (name, dtype as in the file, shape) in file order; the data section starts at a multiple of
    `alignment` bytes. Bytes go
    to a temporary file beside `path`; leaving the block without an exception checks that every byte came, syncs, and
    renames. Raises CheckpointError when the system refuses a write.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        tensors: Iterable[tuple[str, str, tuple[int, ...]]],
        metadata: Mapping[str, str],
        alignment: int = 64,
    ):
        self.path = Path(path)
        self._missing: dict[str, int] = {}
        self._stops: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        position = 0
        for name, dtype, shape in tensors:
            if name in self._stops:
                raise CheckpointError(f"cannot write {self.path}: two tensors are named {name!r}")
            nbytes = math.prod(shape) * DTYPES[dtype][0] // 8
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
            position += nbytes
            self._stops[name] = position
            self._missing[name] = nbytes
        text = json.dumps(header, separators=(",", ":")).encode("ascii")
        text += b" " * (-(8 + len(text)) % alignment)
        self._head = len(text).to_bytes(8, "little") + text
        self._stops = {name: len(self._head) + stop for name, stop in self._stops.items()}
        self.nbytes = len(self._head) + position
        self._temporary = temporary_beside(self.path)

    def __enter__(self) -> TensorWriter:
        try:
            self._file = os.open(self._temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_error(self.path, error) from error
        try:
            self._write(memoryview(self._head), 0)
        except BaseException:
            self._abandon()
            raise
        return self

    def write(self, name: str, data: Tensor) -> None:
        """Writes the next bytes of tensor `name`, all or some of those still missing: uint8, contiguous."""
        missing = self._missing[name]
        if data.numel() > missing:
            raise CheckpointError(
                f"cannot write {self.path}: tensor {name!r} takes {missing} more bytes, got {data.numel()}"
            )
        self._write(data.numpy().data, self._stops[name] - missing)
        self._missing[name] = missing - data.numel()

    def _write(self, data: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file, data[done : done + CHUNK], offset + done)
            # Linux begins to write these pages to the disk now, so that the sync at the end has less to wait for.
            os.posix_fadvise(self._file, offset, done, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise write_error(self.path, error) from error

    def __exit__(self, kind, value, traceback) -> None:
        if kind is not None:
            self._abandon()
            return
        unwritten = [name for name, nbytes in self._missing.items() if nbytes]
        if unwritten:
            self._abandon()
            raise CheckpointError(
                f"cannot finish {self.path}: {len(unwritten)} tensors were not written: {unwritten[0]!r}"
            )
        try:
            try:
                os.fsync(self._file)
            finally:
                os.close(self._file)
            _take_name(self._temporary, self.path)
        except OSError as error:
            self._temporary.unlink(missing_ok=True)
            raise write_error(self.path, error) from error

    def _abandon(self) -> None:
        os.close(self._file)
        self._temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file atomically and durably. Raises CheckpointError."""
    with written_whole(path) as file:
        file.write(text.encode("utf-8"))


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's bytes atomically and durably. Raises CheckpointError."""
    with written_whole(target) as file, open(source, "rb") as original:
        shutil.copyfileobj(original, file, CHUNK)


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the name `path` when the block ends, and vanishes when it raises."""
    temporary = temporary_beside(path)
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(descriptor)
            _take_name(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(path, error) from error


def temporary_beside(path: Path) -> Path:
    """A name for what is to become `path`, in the same folder; no other run has or will have it."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def path_within(folder: Path, name: str) -> Path:
    """The path of a file about to be written to a folder; its parents are made. Raises CheckpointError."""
    path = folder / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(path.parent, error) from error
    return path


def remove_temporaries(folder: Path) -> None:
    """Removes what killed runs were writing in a folder and in those below; no run may be writing there now."""
    for path in list(folder.rglob(".*.tmp")):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def check_room(folder: Path, needed: int) -> None:
    """Raises CheckpointError where the disk of a folder has not `needed` bytes left."""
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise write_error(folder, error) from error
    if free < needed:
        raise CheckpointError(
            f"not enough space for {folder}: it takes {needed / 1e6:,.1f} MB beside what is there, "
            f"{free / 1e6:,.1f} MB are free"
        )


def _take_name(temporary: Path, path: Path) -> None:
    """Renames what was synced, durably."""
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes renames within a folder durable."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def sync_tree(path: Path) -> None:
    """Makes everything in a folder durable: its files' bytes and their names."""
    for parent, _, files in os.walk(path):
        for name in files:
            descriptor = os.open(Path(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(parent))


def remove_empty(folder: Path) -> None:
    """Removes a folder if nothing is in it."""
    try:
        folder.rmdir()
    except OSError:
        return
