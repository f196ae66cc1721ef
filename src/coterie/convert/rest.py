"""All of a checkpoint but its experts, copied: the other tensors into shards, the other files as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import torch

from coterie.checkpoints.folder import PACKED_INDEX, Folder
from coterie.checkpoints.packed import VERSION, PackedLayer, layer_file
from coterie.checkpoints.tensorfile import DTYPES
from coterie.checkpoints.tensorwriter import TensorWriter, copy_file, write_text
from coterie.convert.output import OutputFolder
from coterie.formats import Format

SHARD_BYTES = 5 << 30
CHUNK = 16 << 20
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}


class Rest:
    """Everything of a checkpoint but the tensors named in `experts`.

    Every shard is opened, so a broken one raises CheckpointError here, before anything is written.
    """

    def __init__(self, folder: Folder, experts: Collection[str]):
        self._folder = folder
        self._names = [name for name in folder.shard_of if name not in experts]
        self._files = list(other_files(folder.root))
        self.tensor_bytes = sum(folder.nbytes(name) for name in self._names)
        self.nbytes = self.tensor_bytes + sum((folder.root / name).stat().st_size for name in self._files)

    def copy(self, spec: Format, layers: Iterable[PackedLayer], output: OutputFolder) -> None:
        """Copies it, then writes config.json and, last, the index of everything: from then on `output` is a checkpoint.

        `layers` are the layers packed there already, as `spec`.
        """
        weight_map = self._copy_tensors(output)
        total_size = self.tensor_bytes
        for layer in layers:
            weight_map |= {name: layer_file("", layer.layer).name for name, _, _ in layer.tensors()}
            total_size += layer.nbytes
        self._copy_files(output)
        config = self._folder.config | {"quantization_config": quantization_config(spec)}
        write_text(output.file("config.json"), json.dumps(config, indent=2) + "\n")
        metadata = {"total_size": total_size, "dtype": self._dtype()}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        write_text(output.file(PACKED_INDEX), json.dumps(index, indent=2) + "\n")

    def _dtype(self) -> str:
        """The dtype of the first tensor of numbers, for a config.json that names none: Transformers asks the index."""
        dtypes = (DTYPES[self._folder.file_of(name).entry(name).dtype][1] for name in self._names)
        found = next((dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point), torch.float32)
        return str(found).removeprefix("torch.")

    def _copy_tensors(self, output: OutputFolder) -> dict[str, str]:
        """Copies the tensors bit for bit into new shards; returns the shard of each."""
        folder = self._folder
        shards = list(_shards(folder, self._names))
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            shard = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            entries = [folder.file_of(name).entry(name) for name in names]
            layout = [(entry.name, entry.dtype, entry.shape) for entry in entries]
            with TensorWriter(output.file(shard), layout, {"format": "pt"}) as writer:
                for name in names:
                    for chunk in folder.file_of(name).bytes(name).split(CHUNK):
                        writer.write(name, chunk)
                        folder.release(name)
            weight_map |= dict.fromkeys(names, shard)
        return weight_map

    def _copy_files(self, output: OutputFolder) -> None:
        for name in self._files:
            copy_file(self._folder.root / name, output.file(name))


def _shards(folder: Folder, names: list[str]) -> Iterator[list[str]]:
    """Names in the order of the source's files, cut into shards; wide dtypes first, so that all are aligned."""
    shard: list[str] = []
    size = 0
    for name in sorted(names, key=lambda name: (folder.shard_of[name], folder.file_of(name).entry(name).start)):
        nbytes = folder.nbytes(name)
        if shard and size + nbytes > SHARD_BYTES:
            yield _aligned(folder, shard)
            shard, size = [], 0
        shard.append(name)
        size += nbytes
    if shard:
        yield _aligned(folder, shard)


def _aligned(folder: Folder, names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: -DTYPES[folder.file_of(name).entry(name).dtype][0])


def other_files(root: Path) -> Iterator[str]:
    """Files that are not weights, an index of them, config.json or hidden (tokenizer, templates, code, licence): paths
    within `root`."""
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            skipped = name.startswith(".") or path.suffix in WEIGHTS or name.endswith(".index.json")
            if not skipped and path != root / "config.json":
                yield str(path.relative_to(root))


def quantization_config(spec: Format) -> dict:
    """What config.json says of the packed experts."""
    return {
        "quant_method": "coterie",
        "version": VERSION,
        "experts": spec.name,
        "group_size": spec.group_size,
        "zero_point": spec.zero_point,
    }
