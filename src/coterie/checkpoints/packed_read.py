"""Opening a packed layer: read straight into the memory the kernels read, or mapped where it lies."""

from __future__ import annotations

import os
from pathlib import Path

from coterie.checkpoints.packed import UNFINISHED, PackedLayer, layer_file, packed_layers, read_layout
from coterie.checkpoints.tensorfile import TensorFile
from coterie.errors import CheckpointError
from coterie.experts import Experts

ALIGNMENT = 64


def open_layer(path: str | os.PathLike, layer: int = 0, mmap: bool = False) -> Experts:
    """The packed experts of a layer, from a checkpoint folder or from that layer's .safetensors file.

    mmap=False reads the bytes into huge-page memory, mmap=True uses the file's own pages, shared between processes and
    evicted under memory pressure. The bits are the same. Raises CheckpointError.
    """
    path = Path(path)
    source = layer_file(path, layer)
    if not source.exists():
        have = packed_layers(path) if path.is_dir() else []
        found = f"packed layers found: {', '.join(map(str, have))}" if have else "no packed layers found"
        raise CheckpointError(f"{source} does not exist: no layer {layer} in {path}; {found}")
    if (source.parent / UNFINISHED).exists():
        raise CheckpointError(f"{source.parent} is an unfinished conversion ({UNFINISHED} is there): convert it again")
    file = TensorFile(source)
    layout = read_layout(file)
    if layout.layer != layer:
        raise CheckpointError(f"{source} holds layer {layout.layer}, asked for layer {layer}")
    experts = _mapped(file, layout) if mmap else _read(file, layout)
    if layout.biased:
        experts.set_biases(**{p: file.tensor(layout.bias_name(p)).clone() for p in layout.biased})
    return experts


def _mapped(file: TensorFile, layout: PackedLayer) -> Experts:
    for entry in file.entries.values():
        if entry.name.endswith(".weight") and (file.data_start + entry.start) % ALIGNMENT:
            raise CheckpointError(
                f"{file.path}, tensor {entry.name}: not {ALIGNMENT}-byte aligned, so it cannot be used where it lies; "
                "open it with mmap=False"
            )
    return Experts.from_parts(
        layout.num_experts,
        layout.hidden_size,
        layout.intermediate_size,
        layout.spec,
        lambda projection, expert, part: file.bytes(layout.part_name(projection, expert, part)),
        activation=layout.activation,
        has_gate=layout.has_gate,
        copy=False,
    )


def _read(file: TensorFile, layout: PackedLayer) -> Experts:
    experts = Experts.empty(
        layout.num_experts,
        layout.hidden_size,
        layout.intermediate_size,
        format=layout.spec.name,
        group_size=layout.spec.group_size,
        zero_point=layout.spec.zero_point,
        activation=layout.activation,
        has_gate=layout.has_gate,
    )
    for projection, expert, part, view in experts.parts():
        file.read_into(layout.part_name(projection, expert, part), view.numpy().data)
    return experts
