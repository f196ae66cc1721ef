"""Reading every checkpoint format, writing the packed one.

`open_layer` and `write_layer` read and write the packed format; `open_reader` gives the experts of an unpacked
checkpoint one at a time. `Experts.open` opens a layer of any of them.
"""

from __future__ import annotations

import os
from pathlib import Path

from coterie.checkpoints.codes import Codes
from coterie.checkpoints.gguf_file import is_gguf
from coterie.checkpoints.packed import UNFINISHED, is_packed, packed_layers
from coterie.checkpoints.packed_read import PackedFile, open_layer
from coterie.checkpoints.packed_write import LayerWriter, write_layer
from coterie.checkpoints.reader import LayerReader, Reader
from coterie.checkpoints.readers import open_reader
from coterie.checkpoints.tensorfile import TensorFile

__all__ = [
    "Codes",
    "LayerReader",
    "LayerWriter",
    "PackedFile",
    "Reader",
    "open_layer",
    "open_reader",
    "packed",
    "write_layer",
]


def packed(path: str | os.PathLike) -> bool:
    """Whether a path is a checkpoint in the packed format (finished or not), or one layer's file of one."""
    path = Path(path)
    if path.is_dir():
        return bool(packed_layers(path)) or (path / UNFINISHED).exists()
    return path.exists() and not is_gguf(path) and is_packed(TensorFile(path))
