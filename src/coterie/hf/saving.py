"""The index of a packed checkpoint that Transformers and coterie have written into one folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

from coterie.checkpoints.folder import INDEX, PACKED_INDEX, SINGLE
from coterie.checkpoints.tensorfile import TensorFile
from coterie.checkpoints.tensorwriter import write_text

ONE_SHARD = "model-00001-of-00001.safetensors"


def write_index(folder: Path) -> None:
    """Names the shards that Transformers wrote, and those of the experts, in the index of a packed checkpoint."""
    (folder / INDEX).unlink(missing_ok=True)
    if (folder / SINGLE).exists():
        os.replace(folder / SINGLE, folder / ONE_SHARD)
    entries = {file.name: TensorFile(file).entries for file in sorted(folder.glob("*.safetensors"))}
    total = sum(entry.nbytes for file in entries.values() for entry in file.values())
    weight_map = {name: file for file, names in entries.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / PACKED_INDEX, json.dumps(index, indent=2) + "\n")
