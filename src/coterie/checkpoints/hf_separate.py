"""Experts stored one matrix apart from the other: `...experts.{e}.gate_proj.weight` and its like."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.activations import Activation
from coterie.checkpoints.codes import Codes
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.naming import PER_EXPERT, LayerNames, names_tried
from coterie.checkpoints.reader import LayerReader
from coterie.checkpoints.scheme import Scheme
from coterie.checkpoints.schemes import choose, choose_all
from coterie.checkpoints.tensorfile import PLAIN_DTYPES, shown
from coterie.errors import CheckpointError, MissingTensorError
from coterie.formats import Format


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparateExperts(LayerReader):
    """One layer of per-expert tensors. `stem` begins their names, `leaves` maps gate, up, down to what follows.

    schemes: how each matrix is stored, by what begins the names of its tensors.
    """

    folder: Folder
    stem: str
    leaves: dict[str, str]
    schemes: dict[str, Scheme]

    def _base(self, expert: int, part: str) -> str:
        return f"{self.stem}.{expert}.{self.leaves[part]}"

    def expert(self, expert: int) -> dict[str, Tensor | Codes]:
        bases = {part: self._base(expert, part) for part in self.leaves}
        return {part: self.schemes[base].read(self.folder, base) for part, base in bases.items()}

    def stored(self, expert: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        bases = {part: self._base(expert, part) for part in weights}
        return {base + self.schemes[base].codes.suffix: weights[part] for part, base in bases.items()}

    def biases(self) -> dict[str, Tensor]:
        return {
            part: torch.stack(
                [self.folder.tensor(f"{self._base(e, part)}.bias").float() for e in range(self.num_experts)]
            )
            for part in self.biased
        }

    def release(self, expert: int) -> None:
        for part in self.leaves:
            base = self._base(expert, part)
            self.schemes[base].release(self.folder, base)


def open_separate(
    folder: Folder, names: LayerNames, activation: Activation, schemes: Sequence[Scheme]
) -> SeparateExperts:
    """Checks every tensor of the layer against the first expert's shapes. Raises CheckpointError.

    Matrices may be stored in different ways, each in one of `schemes`.
    """
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
    intermediate, hidden = scheme.size(folder, first)
    sizes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    biased = tuple(part for part, leaf in leaves.items() if f"{names.stem}.0.{leaf}.bias" in folder.shard_of)
    bases = {f"{names.stem}.{e}.{leaf}": sizes[part] for e in experts for part, leaf in leaves.items()}
    biases = {f"{names.stem}.{e}.{leaves[part]}.bias": sizes[part][:1] for e in experts for part in biased}
    chosen = choose_all(scheme, schemes, folder, bases)
    if len(schemes) > 1:
        for base, scheme in chosen.items():
            refuse_other_kinds(folder, base, names.kinds, scheme, bias=".bias")
    for name, shape in biases.items():
        folder.expect(name, shape, PLAIN_DTYPES)
    chosen = _drop_zero_points(folder, chosen)
    return SeparateExperts(
        num_experts=len(experts),
        hidden_size=hidden,
        intermediate_size=intermediate,
        has_gate="gate" in leaves,
        biased=biased,
        activation=activation,
        specs={"gate_up": _specs(chosen, leaves["up"], leaves.get("gate")), "down": _specs(chosen, leaves["down"])},
        tensors=(*(name for base, scheme in chosen.items() for name in scheme.names(folder, base)), *biases),
        nbytes=sum(scheme.nbytes(folder, base) for base, scheme in chosen.items()),
        folder=folder,
        stem=names.stem,
        leaves=leaves,
        schemes=chosen,
    )


def _specs(chosen: dict[str, Scheme], *leaves: str | None) -> tuple[Format | None, ...]:
    """The formats of the matrices that these leaves end the names of, each once."""
    return tuple(dict.fromkeys(scheme.spec for base, scheme in chosen.items() if base.rpartition(".")[2] in leaves))


def _drop_zero_points(folder: Folder, chosen: dict[str, Scheme]) -> dict[str, Scheme]:
    """The same, each scheme without zero points where all of its matrices are symmetric."""
    settled = {}
    for scheme in dict.fromkeys(chosen.values()):
        bases = [base for base, other in chosen.items() if other == scheme]
        symmetric = all(scheme.symmetric(folder, base) for base in bases)
        settled[scheme] = scheme.without_zero_points() if symmetric else scheme
    return {base: settled[scheme] for base, scheme in chosen.items()}


def refuse_other_kinds(folder: Folder, base: str, kinds: Iterable[str], scheme: Scheme, bias: str) -> None:
    """Raises CheckpointError for a tensor of matrix `base`, its name ending in one of `kinds`, that the scheme does not
    know: it could change what the codes mean."""
    for kind in sorted(set(kinds) - scheme.known - {bias}):
        if base + kind in folder.shard_of:
            raise CheckpointError(
                f"{folder.file_of(base + kind).path}, tensor {shown(base + kind)}: this version does not know what it "
                f"does to weights that are stored as {', '.join(scheme.suffixes)}; expected no others but {bias}"
            )
