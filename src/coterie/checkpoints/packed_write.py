"""Writing a packed layer: expert by expert, a file that appears whole or not at all."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coterie.checkpoints.packed import PackedLayer, layer_file
from coterie.checkpoints.tensorwriter import TensorWriter, write_error
from coterie.formats import EXPERT_ALIGN

if TYPE_CHECKING:
    from coterie.experts import Experts


class LayerWriter:
    """Writes the packed file of one layer into `path` (a folder, or a .safetensors file). A context manager.

    Experts may come in any order and in pieces of any number; leaving the block without an exception completes the
    file, leaving it with one removes what was written. Raises CheckpointError when the system refuses a write.
    """

    def __init__(self, path: str | os.PathLike, layout: PackedLayer):
        self.layout = layout
        self._file = TensorWriter(layer_file(path, layout.layer), layout.tensors(), layout.metadata(), EXPERT_ALIGN)
        self.path, self.nbytes = self._file.path, self._file.nbytes

    def __enter__(self) -> LayerWriter:
        self._file.__enter__()
        return self

    def __exit__(self, kind, value, traceback) -> None:
        self._file.__exit__(kind, value, traceback)

    def write_experts(self, experts: Experts, first: int = 0) -> None:
        """Writes all of `experts` as the layer's experts `first`, `first + 1`, ..."""
        for expert in range(experts.num_experts):
            self._file.write(self.layout.expert_name(first + expert), experts.packed(expert))

    def write_bias(self, projection: str, bias: Tensor) -> None:
        """Writes the biases of all experts' `projection`: [E, rows]."""
        data = bias.to(torch.float32).contiguous()
        self._file.write(self.layout.bias_name(projection), data.view(-1).view(torch.uint8))


def write_layer(path: str | os.PathLike, layer: int, experts: Experts, source: str = "") -> None:
    """Saves packed experts as layer `layer` of the folder `path` (made if missing), or as the .safetensors file `path`.

    Raises CheckpointError when it cannot be written; then nothing is left behind, and a file that was there stays.
    """
    file = layer_file(path, layer)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(file.parent, error) from error
    biases = experts.biases()
    layout = PackedLayer(
        layer=layer,
        num_experts=experts.num_experts,
        hidden_size=experts.hidden_size,
        intermediate_size=experts.intermediate_size,
        formats=experts.formats,
        has_gate=experts.has_gate,
        activation=experts.activation,
        biased=tuple(biases),
        source=source,
    )
    with LayerWriter(file, layout) as writer:
        writer.write_experts(experts)
        for projection, bias in biases.items():
            writer.write_bias(projection, bias)
