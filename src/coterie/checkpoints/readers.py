"""The formats of unpacked checkpoints: which reader reads a path."""

from __future__ import annotations

import os

from coterie.checkpoints.folder import Folder
from coterie.checkpoints.gguf import GgufReader
from coterie.checkpoints.gguf_file import GgufFile, find_gguf
from coterie.checkpoints.hf import HFReader
from coterie.checkpoints.reader import Reader


def open_reader(path: str | os.PathLike) -> Reader:
    """A reader of the experts of an unpacked checkpoint: a folder, a .safetensors file or a GGUF file
    (or a folder with nothing but one).

    Raises CheckpointError when it is broken or quantised in a way that is not read, MissingTensorError when no format
    finds experts in it.
    """
    file = find_gguf(path)
    return HFReader(Folder(path)) if file is None else GgufReader(GgufFile(file))
