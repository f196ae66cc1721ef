"""Experts stored one matrix apart from the other: `...experts.{e}.gate_proj.weight` and its like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.activations import Activation
from coterie.checkpoints.codes import Codes
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.naming import PER_EXPERT, LayerNames, names_tried
from coterie.checkpoints.reader import LayerReader
from coterie.checkpoints.schemes import Scheme, choose
from coterie.checkpoints.tensorfile import PLAIN_DTYPES, shown
from coterie.errors import CheckpointError, MissingTensorError


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparateExperts(LayerReader):
    """One layer of per-expert tensors. `stem` begins their names, `leaves` maps gate, up, down to what follows."""

    folder: Folder
    stem: str
    leaves: dict[str, str]
    scheme: Scheme

    def _base(self, expert: int, part: str) -> str:
        return f"{self.stem}.{expert}.{self.leaves[part]}"

    def expert(self, expert: int) -> dict[str, Tensor | Codes]:
        return {part: self.scheme.read(self.folder, self._base(expert, part)) for part in self.leaves}

    def stored(self, expert: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self._base(expert, part) + self.scheme.codes.suffix: weight for part, weight in weights.items()}

    def biases(self) -> dict[str, Tensor]:
        return {
            part: torch.stack(
                [self.folder.tensor(f"{self._base(e, part)}.bias").float() for e in range(self.num_experts)]
            )
            for part in self.biased
        }

    def release(self, expert: int) -> None:
        for part in self.leaves:
            self.scheme.release(self.folder, self._base(expert, part))


def open_separate(
    folder: Folder, names: LayerNames, activation: Activation, schemes: Sequence[Scheme]
) -> SeparateExperts:
    """Checks every tensor of the layer against the first expert's shapes. Raises CheckpointError."""
    have = set().union(*names.experts.values())
    leaves = next((row for row in PER_EXPERT if have <= set(row.values())), None)
    if leaves is None:
        raise CheckpointError(
            f"{folder.path}, {names.stem}: experts named in two ways at once: {', '.join(sorted(have))}"
        )
    if not names.has_gate:
        leaves = {part: leaf for part, leaf in leaves.items() if part != "gate"}
    experts = range(max(names.experts) + 1)
    for expert in experts:
        missing = [
            f"{names.stem}.{expert}.{leaf}{schemes[0].codes.suffix}"
            for leaf in set(leaves.values()) - names.experts.get(expert, set())
        ]
        if missing:
            raise MissingTensorError(
                f"{folder.path} has no tensor {min(missing)}; "
                f"the names tried: {', '.join(names_tried(names.stem, str(expert)))}"
            )
    first = f"{names.stem}.0.{leaves['up']}"
    scheme = choose(schemes, folder, first)
    refuse_other_kinds(folder, names, scheme, bias=".bias")
    intermediate, hidden = scheme.size(folder, first)
    sizes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    biased = tuple(part for part, leaf in leaves.items() if f"{names.stem}.0.{leaf}.bias" in folder.shard_of)
    bases = {f"{names.stem}.{e}.{leaf}": sizes[part] for e in experts for part, leaf in leaves.items()}
    biases = {f"{names.stem}.{e}.{leaves[part]}.bias": sizes[part][:1] for e in experts for part in biased}
    for base, size in bases.items():
        scheme.check(folder, base, size)
    for name, shape in biases.items():
        folder.expect(name, shape, PLAIN_DTYPES)
    return SeparateExperts(
        num_experts=len(experts),
        hidden_size=hidden,
        intermediate_size=intermediate,
        has_gate="gate" in leaves,
        biased=biased,
        activation=activation,
        spec=scheme.spec,
        tensors=(*(name for base in bases for name in scheme.names(folder, base)), *biases),
        nbytes=sum(scheme.nbytes(folder, base) for base in bases),
        folder=folder,
        stem=names.stem,
        leaves=leaves,
        scheme=scheme,
    )


def refuse_other_kinds(folder: Folder, names: LayerNames, scheme: Scheme, bias: str) -> None:
    """Raises CheckpointError for tensors of quantised experts that the scheme does not know: they could change what
    the codes mean."""
    if scheme.spec is None:
        return
    unknown = sorted(names.kinds.keys() - scheme.known - {bias})
    if unknown:
        name = names.kinds[unknown[0]]
        raise CheckpointError(
            f"{folder.file_of(name).path}, tensor {shown(name)}: this version does not know what it does to weights "
            f"that are stored as {', '.join(scheme.suffixes)}; expected no others but {bias}"
        )
