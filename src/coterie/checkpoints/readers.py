"""The formats of unpacked checkpoints, one row each: the first that recognises a checkpoint reads it."""

from __future__ import annotations

import os

from coterie.checkpoints.folder import Folder
from coterie.checkpoints.hf import HFReader
from coterie.checkpoints.reader import Reader

# HFReader recognises everything, and says what it looked for when it finds nothing: it stays last.
READERS: tuple[type[Reader], ...] = (HFReader,)


def open_reader(path: str | os.PathLike) -> Reader:
    """A reader of the experts of an unpacked checkpoint: a folder or a .safetensors file.

    Raises CheckpointError when it is broken or quantised in a way that is not read, MissingTensorError when no format
    finds experts in it.
    """
    folder = Folder(path)
    return next(reader for reader in READERS if reader.recognises(folder))(folder)
