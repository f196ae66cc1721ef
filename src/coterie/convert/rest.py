"""All of a checkpoint but its experts: linear layers packed if asked for, the other tensors in new shards, the other
files as they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from coterie.checkpoints.folder import PACKED_INDEX, Folder
from coterie.checkpoints.packed import VERSION, PackedLayer, layer_file
from coterie.checkpoints.packed_formats import ModelFormats
from coterie.checkpoints.quantised import MODELOPT_FILE, without_quantisation
from coterie.checkpoints.scheme import Scheme
from coterie.checkpoints.tensorfile import DTYPES
from coterie.checkpoints.tensorwriter import TensorWriter, copy_file, write_text
from coterie.convert.linears import Dense, LinearPacking
from coterie.convert.tensors import AnyTensor, Written, written_tensors

SHARD_BYTES = 5 << 30
NewFile = Callable[[str], Path]  # from the name of a file within the output to its path, its parents made
T = TypeVar("T", bound=AnyTensor)
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt"}


class Rest:
    """Everything of a checkpoint but the tensors named in `experts`; what is stored by one of `schemes` is dequantised,
    and linear layers are packed as `dense` says. linears: those; None where there are none, and then so is `dense`.

    Every shard is opened, so a broken one raises CheckpointError here, before anything is written.
    """

    def __init__(
        self, folder: Folder, experts: Collection[str], schemes: Sequence[Scheme], dense: Dense | None = None
    ):
        self._folder = folder
        names = [name for name in folder.shard_of if name not in experts]
        tensors = {tensor.name: tensor for tensor in written_tensors(folder, names, schemes)}
        self.linears = None
        if dense is not None:
            found = tensors | dict(dense.kept)
            weights = {name: found[source] for name, source in dense.tensors(found.keys()).items()}
            dense = dense.with_own(weights, folder)
            weights = {name: weight for name, weight in weights.items() if dense.spec or name in dense.own}
            self.linears = LinearPacking(folder, dense, weights) if weights else None
            tensors = {name: tensor for name, tensor in tensors.items() if name not in weights}
        self.dense = dense if self.linears else None
        self._tensors = list(tensors.values())
        self._files = list(other_files(folder.root))
        self.source_bytes = sum(folder.nbytes(name) for name in names)
        self.source_bytes += sum(weight.nbytes for weight in dense.kept.values()) if dense else 0
        self.tensor_bytes = sum(tensor.nbytes for tensor in self._tensors)
        self.tensor_bytes += self.linears.nbytes if self.linears else 0
        self.nbytes = self.tensor_bytes + sum((folder.root / name).stat().st_size for name in self._files)

    def copy(
        self, formats: ModelFormats, layers: Iterable[PackedLayer], file: NewFile, max_tensors: int | None = None
    ) -> None:
        """Copies it, then writes config.json and, last, the index of everything, which makes a checkpoint of them.

        `layers` are the layers packed there already, as `formats`. max_tensors: of a shard.
        """
        weight_map = write_shards(self._folder, self._tensors, file, max_tensors)
        if self.linears is not None:
            weight_map |= self.linears.write(file)
        total_size = self.tensor_bytes
        for layer in layers:
            weight_map |= {name: layer_file("", layer.layer).name for name, _, _ in layer.tensors()}
            total_size += layer.nbytes
        copy_files(self._folder.root, self._files, file)
        config = without_quantisation(self._folder.config) | {
            "quantization_config": quantization_config(formats, self.dense)
        }
        write_json(file("config.json"), config)
        write_index(file(PACKED_INDEX), weight_map, total_size=total_size, dtype=self._dtype())

    def _dtype(self) -> str:
        """The dtype of the first tensor of numbers, for a config.json that names none: Transformers asks the index."""
        dtypes = (DTYPES[tensor.dtype][1] for tensor in self._tensors)
        found = next((dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point), torch.float32)
        return str(found).removeprefix("torch.")


def write_shards(
    folder: Folder, tensors: list[Written], file: NewFile, max_tensors: int | None = None
) -> dict[str, str]:
    """Writes tensors of a checkpoint into new shards; returns the shard of each."""
    shards = into_shards(_in_order(folder, tensors), max_tensors)
    weight_map: dict[str, str] = {}
    for name, shard in shards.items():
        write_shard(folder, shard, file(name))
        weight_map |= {tensor.name: name for tensor in shard}
    return weight_map


def write_shard(
    folder: Folder | None,
    tensors: Sequence[AnyTensor],
    path: Path,
    written: Callable[[int, int], None] | None = None,
) -> None:
    """Writes tensors of a checkpoint into one file; wide dtypes first, so that all are aligned.

    `written` is told, after each, how many there are, and the bytes of the last.
    """
    tensors = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype][0])
    layout = [(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]
    with TensorWriter(path, layout, {"format": "pt"}) as writer:
        for count, tensor in enumerate(tensors, 1):
            for chunk in tensor.chunks(folder):
                writer.write(tensor.name, chunk)
            if written is not None:
                written(count, tensor.nbytes)


def write_json(path: Path, found: dict) -> None:
    write_text(path, json.dumps(found, indent=2) + "\n")


def write_index(path: Path, weight_map: dict[str, str], **metadata: object) -> None:
    """Writes a checkpoint's index: `weight_map` has the shard of each tensor."""
    write_json(path, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def copy_files(root: Path, names: Iterable[str], file: NewFile) -> None:
    for name in names:
        copy_file(root / name, file(name))


def into_shards(tensors: Iterable[T], max_tensors: int | None = None) -> dict[str, list[T]]:
    """Tensors cut into shards, by the names of their files."""
    shards: list[list[T]] = []
    size = 0
    for tensor in tensors:
        if not shards or size + tensor.nbytes > SHARD_BYTES or len(shards[-1]) == max_tensors:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return {f"model-{n:05d}-of-{len(shards):05d}.safetensors": shard for n, shard in enumerate(shards, 1)}


def _in_order(folder: Folder, tensors: list[Written]) -> list[Written]:
    """In the order of the source's files."""

    def place(tensor: Written) -> tuple[str, int]:
        return folder.shard_of[tensor.source], folder.file_of(tensor.source).entry(tensor.source).start

    return sorted(tensors, key=place)


def other_files(root: Path) -> Iterator[str]:
    """Files that are not weights, an index of them, config.json, ModelOpt's or hidden (tokenizer, templates, code,
    licence): paths within `root`."""
    for parent, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            skipped = name.startswith(".") or path.suffix in WEIGHTS or name.endswith(".index.json")
            if not skipped and path not in (root / "config.json", root / MODELOPT_FILE):
                yield str(path.relative_to(root))


def quantization_config(formats: ModelFormats, dense: Dense | None = None) -> dict:
    """What config.json says of the packed experts and linear layers."""
    found = {"quant_method": "coterie", "version": VERSION, **formats.stored()}
    if dense is not None:
        found |= {"dense": dense.name} | ({"dense_skip": list(dense.skip)} if dense.skip else {})
    return found
