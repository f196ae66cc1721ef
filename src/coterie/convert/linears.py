"""The linear layers outside a checkpoint's experts that a conversion packs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from coterie.checkpoints.folder import Folder
from coterie.checkpoints.packed_linears import PackedLinears, write_linears
from coterie.convert.report import LinearErrors
from coterie.convert.tensors import Written
from coterie.errors import ArgumentError, CheckpointError
from coterie.formats import Format
from coterie.linear import Linear


@dataclass(frozen=True, slots=True)
class Dense:
    """How linear layers are to be packed: as `spec`, but for those that `skip`, regular expressions, leave out.

    tensors: given the names of a checkpoint's tensors, which are packed: {name when packed: the tensor that has the
    weight}. The two differ where a head shares its weight with the embedding. Only a model knows: see `coterie.hf`.
    """

    spec: Format
    skip: tuple[str, ...]
    tensors: Callable[[Collection[str]], dict[str, str]]

    @property
    def described(self) -> str:
        return self.spec.described + (f" without {' '.join(self.skip)}" if self.skip else "")


class LinearPacking:
    """Linear layers of a checkpoint, {name when packed: tensor}, packed as `spec` one at a time, and what that cost."""

    def __init__(self, folder: Folder, spec: Format, weights: Mapping[str, Written]):
        for name, weight in weights.items():
            if len(weight.shape) != 2:
                raise CheckpointError(f"{folder.path}, tensor {name}: shape {list(weight.shape)}, expected a matrix")
        self.layout = PackedLinears(spec, {name: (w.shape[0], w.shape[1]) for name, w in weights.items()})
        self.nbytes = sum(map(self.layout.nbytes, weights))
        self.errors = LinearErrors()
        self._folder, self._weights = folder, weights

    def write(self, file: Callable[[str], Path]) -> dict[str, str]:
        """Writes them, and returns the file of each. Raises CheckpointError for a weight that no format can hold."""
        return write_linears(file, self.layout.spec, self.layout.shapes, self._pack)

    def _pack(self, name: str) -> Tensor:
        linear = Linear.empty(*self.layout.shapes[name], format=self.layout.spec)
        try:
            error = linear.pack_weight(self._weights[name].tensor(self._folder))
        except ArgumentError as problem:
            raise CheckpointError(f"{name}: {problem}; --dense-skip leaves layers out") from problem
        self.errors.add(name, error)
        return linear.packed
