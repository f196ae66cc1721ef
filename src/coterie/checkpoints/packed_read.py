"""Opening a packed layer's file; its bytes are read straight into the memory the kernels read, or used as they lie."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from coterie.checkpoints.packed import UNFINISHED, PackedLayer, layer_file, packed_layers, read_layout
from coterie.checkpoints.tensorfile import TensorFile
from coterie.errors import CheckpointError
from coterie.formats import EXPERT_ALIGN


@dataclass(frozen=True, slots=True)
class PackedFile:
    """The file of a packed layer, found to hold exactly what `layout` says. Raises CheckpointError where it breaks."""

    file: TensorFile
    layout: PackedLayer

    def mapped(self, expert: int) -> Tensor:
        """One expert's bytes, uint8, where they lie in the file's own pages."""
        entry = self.file.entry(self.layout.expert_name(expert))
        if (self.file.data_start + entry.start) % EXPERT_ALIGN:
            raise CheckpointError(
                f"{self.file.path}, tensor {entry.name}: not {EXPERT_ALIGN}-byte aligned, so it cannot be used where "
                "it lies; open it with mmap=False"
            )
        return self.file.bytes(entry.name)

    def read_into(self, expert: int, memory: Tensor) -> None:
        """Reads the same bytes into a uint8 tensor of exactly their size."""
        self.file.read_into(self.layout.expert_name(expert), memory.numpy().data)

    def biases(self) -> dict[str, Tensor]:
        """Float32 biases by projection, [E, rows]; empty where there are none."""
        return {name: self.file.tensor(self.layout.bias_name(name)).clone() for name in self.layout.biased}


def open_layer(path: str | os.PathLike, layer: int = 0) -> PackedFile:
    """The packed file of a layer, of a checkpoint folder or that layer's .safetensors file. Raises CheckpointError."""
    path = Path(path)
    source = layer_file(path, layer)
    if not source.exists():
        have = packed_layers(path) if path.is_dir() else []
        found = f"packed layers found: {', '.join(map(str, have))}" if have else "no packed layers found"
        raise CheckpointError(f"{source} does not exist: no layer {layer} in {path}; {found}")
    if (source.parent / UNFINISHED).exists():
        raise CheckpointError(f"{source.parent} is an unfinished conversion ({UNFINISHED} is there): finish it")
    file = TensorFile(source)
    layout = read_layout(file)
    if layout.layer != layer:
        raise CheckpointError(f"{source} holds layer {layout.layer}, asked for layer {layer}")
    return PackedFile(file, layout)
