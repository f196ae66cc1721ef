"""Reading every checkpoint format, writing the packed one.

`open_experts` opens a layer of any of them; `open_layer` and `write_layer` read and write the packed format;
`open_reader` gives the experts of an unpacked checkpoint one at a time.
"""

from __future__ import annotations

import os
from pathlib import Path

from coterie.checkpoints.packed import UNFINISHED, is_packed, packed_layers
from coterie.checkpoints.packed_read import open_layer
from coterie.checkpoints.packed_write import LayerWriter, write_layer
from coterie.checkpoints.reader import LayerReader, Reader
from coterie.checkpoints.readers import open_reader
from coterie.checkpoints.tensorfile import TensorFile
from coterie.errors import ArgumentError
from coterie.experts import Experts

__all__ = [
    "LayerReader",
    "LayerWriter",
    "Reader",
    "open_experts",
    "open_layer",
    "open_reader",
    "pack_layer",
    "packed",
    "write_layer",
]


def open_experts(
    path: str | os.PathLike,
    layer: int = 0,
    mmap: bool = False,
    *,
    format: str = "bf16",
    group_size: int | None = None,
    zero_point: bool = False,
) -> Experts:
    """The experts of one layer of a checkpoint in any format that can be read, detected: a folder or a file.

    A packed checkpoint is opened as it is: `format`, `group_size` and `zero_point` say what the experts of an unpacked
    one are packed into. mmap=True uses the pages of the file itself, and is for packed checkpoints only.
    Raises CheckpointError (MissingTensorError, listing the names tried, where a tensor is missing) and ArgumentError.
    """
    if packed(path):
        return open_layer(path, layer, mmap)
    reader = open_reader(path).layer(layer)
    if mmap:
        raise ArgumentError(
            f"{path} is not packed, so its experts cannot be mapped: convert it, or open it with mmap=False"
        )
    return pack_layer(reader, format=format, group_size=group_size, zero_point=zero_point)


def packed(path: str | os.PathLike) -> bool:
    """Whether a path is a checkpoint in the packed format (finished or not), or one layer's file of one."""
    path = Path(path)
    if path.is_dir():
        return bool(packed_layers(path)) or (path / UNFINISHED).exists()
    return path.exists() and is_packed(TensorFile(path))


def pack_layer(
    reader: LayerReader, *, format: str = "bf16", group_size: int | None = None, zero_point: bool = False
) -> Experts:
    """Packs a layer of an unpacked checkpoint: beyond what is kept, one expert is in memory at a time."""
    experts = Experts.empty(
        reader.num_experts,
        reader.hidden_size,
        reader.intermediate_size,
        format=format,
        group_size=group_size,
        zero_point=zero_point,
        activation=reader.activation,
        has_gate=reader.has_gate,
    )
    for expert in range(reader.num_experts):
        for projection, weight in reader.expert(expert).items():
            experts.pack_projection(projection, expert, weight)
        reader.release(expert)
    if biases := reader.biases():
        experts.set_biases(**biases)
    return experts
