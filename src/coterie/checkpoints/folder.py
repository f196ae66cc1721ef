"""A checkpoint folder as Hugging Face lays it out: config.json, an index, shards."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from torch import Tensor

from coterie.checkpoints.gguf_file import find_gguf
from coterie.checkpoints.tensorfile import TensorFile, shown
from coterie.errors import CheckpointError, MissingTensorError

INDEX = "model.safetensors.index.json"
PACKED_INDEX = "coterie.safetensors.index.json"  # of a packed checkpoint: not the name that plain Transformers opens
SINGLE = "model.safetensors"


class Folder:
    """The tensors of a folder (or of one .safetensors file) by name; shards are opened when first needed.

    Raises CheckpointError when `path` is no such folder, a shard is missing, or the index and the shards disagree.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._files: dict[str, TensorFile] = {}
        if not self.path.exists():
            raise CheckpointError(
                f"{self.path} does not exist: expected a checkpoint folder, a .safetensors or a .gguf file"
            )
        if (gguf := find_gguf(self.path)) is not None:
            raise CheckpointError(
                f"{gguf} is a GGUF file: expected a checkpoint folder or a .safetensors file; `coterie convert cpu` "
                "makes a packed folder of it, `coterie convert dequantize` a plain one"
            )
        if self.path.is_dir():
            self.root = self.path
            self.shard_of = self._names()
        else:
            self.root = self.path.parent
            self.shard_of = dict.fromkeys(self.file(self.path.name).entries, self.path.name)

    @cached_property
    def config(self) -> dict:
        """config.json, or {} where the path is a bare file or has none."""
        path = self.root / "config.json"
        return read_json(path) if self.path.is_dir() and path.exists() else {}

    @property
    def text_config(self) -> Mapping:
        """The part of the config that describes the language model (all of it, but for multimodal models)."""
        nested = self.config.get("text_config")
        return nested if isinstance(nested, dict) else self.config

    @property
    def shards(self) -> list[str]:
        """The names of the shard files, sorted."""
        return sorted(set(self.shard_of.values()))

    def file(self, shard: str) -> TensorFile:
        """The open shard of that file name."""
        if shard not in self._files:
            self._files[shard] = TensorFile(self.root / shard)
        return self._files[shard]

    def file_of(self, name: str) -> TensorFile:
        """The shard that holds tensor `name`. Raises MissingTensorError."""
        try:
            shard = self.shard_of[name]
        except KeyError:
            raise MissingTensorError(f"{self.path} has no tensor {shown(name)}") from None
        file = self.file(shard)
        if name not in file.entries:
            raise MissingTensorError(
                f"{self.path}: the index puts tensor {shown(name)} in {shard}, which does not hold it"
            )
        return file

    def tensor(self, name: str) -> Tensor:
        """Tensor `name`, a view of the mapped shard wherever its alignment allows."""
        return self.file_of(name).tensor(name)

    def nbytes(self, name: str) -> int:
        """Bytes of tensor `name`."""
        return self.file_of(name).entry(name).nbytes

    def release(self, name: str, index: int = 0, count: int = 1) -> None:
        """Lets go of the memory of a tensor's pages: see TensorFile.release."""
        self.file_of(name).release(name, index, count)

    def shape(self, name: str, dimensions: int, dtypes: tuple[str, ...]) -> tuple[int, ...]:
        """The shape of tensor `name`. Raises CheckpointError when its dtype or number of dimensions is another."""
        file = self.file_of(name)
        entry = file.entry(name)
        if entry.dtype not in dtypes:
            raise CheckpointError(
                f"{file.path}, tensor {shown(name)}: dtype {entry.dtype}, expected one of {', '.join(dtypes)}"
            )
        if len(entry.shape) != dimensions or 0 in entry.shape:
            raise CheckpointError(
                f"{file.path}, tensor {shown(name)}: shape {list(entry.shape)}, "
                f"expected {dimensions} dimensions, none of them 0"
            )
        return entry.shape

    def expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        """Raises CheckpointError unless tensor `name` has that shape and one of those dtypes."""
        found = self.shape(name, len(shape), dtypes)
        if found != shape:
            raise CheckpointError(
                f"{self.file_of(name).path}, tensor {shown(name)}: shape {list(found)}, expected {list(shape)}"
            )

    def _names(self) -> dict[str, str]:
        if (self.root / SINGLE).exists():
            return dict.fromkeys(self.file(SINGLE).entries, SINGLE)
        for index in (INDEX, PACKED_INDEX):
            if (self.root / index).exists():
                return self._indexed(index)
        shards = sorted(file.name for file in self.root.glob("*.safetensors"))
        if not shards:
            raise CheckpointError(f"{self.path} holds no checkpoint: {self._other_weights()}")
        names: dict[str, str] = {}
        for shard in shards:
            for name in self.file(shard).entries:
                if name in names:
                    raise CheckpointError(f"{self.path}: tensor {shown(name)} is in both {names[name]} and {shard}")
                names[name] = shard
        return names

    def _indexed(self, name: str) -> dict[str, str]:
        index = self.root / name
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(shard, str) for shard in names.values()):
            raise CheckpointError(
                f"{index}: expected a weight_map from tensor names to shard files, found {shown(names)}"
            )
        shards = sorted(set(names.values()))
        outside = [shard for shard in shards if Path(shard).is_absolute() or ".." in Path(shard).parts]
        if outside:
            raise CheckpointError(f"{index}: shard {shown(outside[0])} lies outside the folder")
        missing = [shard for shard in shards if not (self.root / shard).is_file()]
        if missing:
            raise CheckpointError(
                f"{self.path}: {len(missing)} of the {len(shards)} shards named in {name} are missing: "
                f"{', '.join(shown(shard) for shard in missing[:4])}{', ...' if len(missing) > 4 else ''}"
            )
        return names

    def _other_weights(self) -> str:
        others = [file.name for pattern in ("*.bin", "*.pth", "*.pt") for file in self.root.glob(pattern)]
        if others:
            return f"no *.safetensors file, only {shown(sorted(others)[0])}; save it as safetensors first"
        return f"no {SINGLE}, no {INDEX}, no *.safetensors file"


def read_json(path: Path) -> dict:
    """A JSON file that must hold an object. Raises CheckpointError."""
    try:
        found = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {shown(str(error))}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds a JSON {type(found).__name__}, expected an object")
    return found
