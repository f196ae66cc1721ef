"""Packed layers as loose files, a folder each, which `merge` puts together."""

from __future__ import annotations

from pathlib import Path

from coterie.checkpoints.packed import FILE_NAME, layer_file
from coterie.errors import CheckpointError


def loose_name(layer: int) -> str:
    """The file of a loose layer within its folder. One layout serves any number of NUMA nodes, so there is one."""
    return f"_layer_{layer}/_numa_0/{layer_file('', layer).name}"


def loose_files(folder: Path) -> dict[int, Path]:
    """The file of each packed layer in a folder or below it, in folders of their own or not, by layer number.

    Raises CheckpointError where two files are of the same layer.
    """
    found: dict[int, Path] = {}
    for path in sorted(folder.rglob("experts-*.safetensors")):
        match = FILE_NAME.fullmatch(path.name)
        if match is None:
            continue
        other = found.setdefault(int(match[1]), path)
        if other != path:
            raise CheckpointError(f"layer {int(match[1])} is in both {other} and {path}: leave one of them out")
    return dict(sorted(found.items()))
