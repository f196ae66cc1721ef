"""The linear layers outside a checkpoint's experts: packed by a conversion, and read as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from coterie.checkpoints.codes import Codes
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.packed_formats import OWN
from coterie.checkpoints.packed_linears import (
    LINEARS_FILE,
    LinearsFile,
    PackedLinears,
    open_linears,
    write_linears,
)
from coterie.checkpoints.tensorfile import DTYPES
from coterie.convert.report import LinearErrors
from coterie.convert.tensors import CHUNK, Written
from coterie.errors import ArgumentError, CheckpointError
from coterie.formats import Format
from coterie.linear import Linear


@dataclass(frozen=True, slots=True)
class KeptLinear:
    """A linear layer whose codes `Dense.codes` has, so that its numbers need not be in the folder: its name there, its
    shape, and the bytes of its codes."""

    source: str
    shape: tuple[int, ...]
    nbytes: int

    def release(self, folder: Folder) -> None:
        """Reading codes lets go of what it took."""


Weight = Written | KeptLinear


@dataclass(frozen=True, slots=True)
class Dense:
    """How linear layers are to be packed: as `spec`, but for those that `skip`, regular expressions, leave out.

    own: where there is no `spec`, that of each, by its name when packed; not known yet: those that have codes, in the
    format of these.
    tensors: given the names of a checkpoint's tensors, which are packed: {name when packed: the tensor that has the
    weight}. The two differ where a head shares its weight with the embedding. Only a model knows: see `coterie.hf`.
    codes: those of a tensor in a format, or in any, if it has them elsewhere: in a GGUF file. format: that of these,
    without reading them. kept: the tensors that are there alone, by name.
    """

    spec: Format | None
    skip: tuple[str, ...]
    tensors: Callable[[Collection[str]], dict[str, str]]
    own: Mapping[str, Format] = field(default_factory=dict)
    codes: Callable[[str, Format | None], Codes | None] | None = None
    format: Callable[[str, Format | None], Format | None] | None = None
    kept: Mapping[str, KeptLinear] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What config.json says."""
        return self.spec.name if self.spec else OWN

    @property
    def described(self) -> str:
        said = self.spec.described if self.spec else ", ".join(s.described for s in dict.fromkeys(self.own.values()))
        return said + (f" without {' '.join(self.skip)}" if self.skip else "")

    def spec_of(self, name: str) -> Format:
        return self.spec or self.own[name]

    def codes_of(self, weight: Weight, folder: Folder, spec: Format | None) -> Codes | None:
        if self.codes:
            return self.codes(weight.source, spec)
        return weight.codes(folder, spec) if isinstance(weight, Written) else None

    def with_own(self, weights: Mapping[str, Weight], folder: Folder) -> Dense:
        """The same where `own` is known: of those `weights` that have codes, which are not read for it."""
        if self.spec is not None or self.own:
            return self
        own = {name: self._format_of(weight, folder) for name, weight in weights.items()}
        return replace(self, own={name: spec for name, spec in own.items() if spec is not None})

    def _format_of(self, weight: Weight, folder: Folder) -> Format | None:
        if self.format:
            return self.format(weight.source, None)
        return weight.format(folder, None) if isinstance(weight, Written) else None


class LinearPacking:
    """Linear layers of a checkpoint, {name when packed: tensor}, packed as `dense` says one at a time, and what that
    cost. Those that are quantised so already keep their codes."""

    def __init__(self, folder: Folder, dense: Dense, weights: Mapping[str, Weight]):
        for name, weight in weights.items():
            if len(weight.shape) != 2:
                raise CheckpointError(f"{folder.path}, tensor {name}: shape {list(weight.shape)}, expected a matrix")
        self._shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
        self._specs = {name: dense.spec_of(name) for name in weights}
        self.nbytes = sum(PackedLinears(self._specs[name], self._shapes).nbytes(name) for name in weights)
        self.errors = LinearErrors()
        self._folder, self._dense, self._weights = folder, dense, weights

    def write(self, file: Callable[[str], Path]) -> dict[str, str]:
        """Writes them, and returns the file of each. Raises CheckpointError for a weight that no format can hold."""
        return write_linears(file, self._specs, self._shapes, self._pack)

    def _pack(self, name: str) -> Tensor:
        spec, weight = self._specs[name], self._weights[name]
        linear = Linear.empty(*self._shapes[name], format=spec)
        codes = self._dense.codes_of(weight, self._folder, spec)
        try:
            if codes is None:
                assert isinstance(weight, Written)
                error = linear.pack_weight(weight.tensor(self._folder))
            else:
                error = linear.pack_codes(codes)
        except ArgumentError as problem:
            raise CheckpointError(f"{name}: {problem}; --dense-skip leaves layers out") from problem
        if codes:
            weight.release(self._folder)
        self.errors.add(name, error)
        return linear.packed


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """A packed linear layer of a checkpoint as the plain tensor that it stands for, in `dtype` as files name it."""

    name: str
    file: LinearsFile
    dtype: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.file.layout.shapes[self.name]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0] // 8

    @property
    def quantised(self) -> bool:
        return True

    def source_nbytes(self, folder: Folder) -> int:
        return self.file.layout.nbytes(self.name)

    def tensor(self) -> Tensor:
        """The dequantised weight: float32 [out, in]."""
        return torch.cat(list(self._pieces()))

    def chunks(self, folder: Folder) -> Iterator[Tensor]:
        """The bytes of the plain tensor, uint8, piece by piece; memory that reading took is let go."""
        for piece in self._pieces():
            yield piece.to(DTYPES[self.dtype][1]).flatten().view(torch.uint8)

    def _pieces(self) -> Iterator[Tensor]:
        spec, (rows, cols), packed = self.file.layout.spec, self.shape, self.file.mapped(self.name)
        step = max(1, CHUNK // 4 // cols // 128) * 128  # whole blocks of rows, which are a packed matrix by themselves
        start = 0
        for row in range(0, rows, step):
            count = min(step, rows - row)
            stop = start + spec.matrix_nbytes(count, cols)
            yield Linear(spec, packed[start:stop], count, cols).dequantize()
            start = stop
        self.file.file.release(self.name)


def stored_linears(folder: Folder, dtype: str) -> dict[str, StoredLinear]:
    """The packed linear layers of a checkpoint by name, {} where it has none. Raises CheckpointError."""
    names = [shard for shard in folder.shards if LINEARS_FILE.fullmatch(shard)]
    files = open_linears(folder.root / name for name in names)
    return {name: StoredLinear(name, file, dtype) for name, file in files.items()}
