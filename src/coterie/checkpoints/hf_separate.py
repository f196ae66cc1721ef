"""Experts stored one tensor a projection: `...experts.{e}.gate_proj.weight` and its like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.activations import Activation
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.naming import PER_EXPERT, LayerNames, names_tried
from coterie.checkpoints.reader import LayerReader
from coterie.checkpoints.tensorfile import PLAIN_DTYPES
from coterie.errors import CheckpointError, MissingTensorError


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparateExperts(LayerReader):
    """One layer of per-expert tensors. `stem` begins their names, `leaves` maps gate, up, down to what ends them."""

    folder: Folder
    stem: str
    leaves: dict[str, str]

    def _name(self, expert: int, part: str, kind: str = "weight") -> str:
        return f"{self.stem}.{expert}.{self.leaves[part]}.{kind}"

    def expert(self, expert: int) -> dict[str, Tensor]:
        return {part: self.folder.tensor(self._name(expert, part)) for part in self.leaves}

    def stored(self, expert: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self._name(expert, part): weight for part, weight in weights.items()}

    def biases(self) -> dict[str, Tensor]:
        return {
            part: torch.stack(
                [self.folder.tensor(self._name(e, part, "bias")).float() for e in range(self.num_experts)]
            )
            for part in self.biased
        }

    def release(self, expert: int) -> None:
        for part in self.leaves:
            self.folder.release(self._name(expert, part))


def open_separate(folder: Folder, names: LayerNames, activation: Activation) -> SeparateExperts:
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
            f"{names.stem}.{expert}.{leaf}.weight" for leaf in set(leaves.values()) - names.experts.get(expert, set())
        ]
        if missing:
            raise MissingTensorError(
                f"{folder.path} has no tensor {min(missing)}; "
                f"the names tried: {', '.join(names_tried(names.stem, str(expert)))}"
            )
    intermediate, hidden = folder.shape(f"{names.stem}.0.{leaves['up']}.weight", 2, PLAIN_DTYPES)
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    biased = tuple(part for part, leaf in leaves.items() if f"{names.stem}.0.{leaf}.bias" in folder.shard_of)
    weights = {f"{names.stem}.{e}.{leaf}.weight": shapes[part] for e in experts for part, leaf in leaves.items()}
    biases = {f"{names.stem}.{e}.{leaves[part]}.bias": shapes[part][:1] for e in experts for part in biased}
    for name, shape in (weights | biases).items():
        folder.expect(name, shape, PLAIN_DTYPES)
    return SeparateExperts(
        num_experts=len(experts),
        hidden_size=hidden,
        intermediate_size=intermediate,
        has_gate="gate" in leaves,
        biased=biased,
        activation=activation,
        tensors=(*weights, *biases),
        nbytes=sum(folder.nbytes(name) for name in weights),
        folder=folder,
        stem=names.stem,
        leaves=leaves,
    )
