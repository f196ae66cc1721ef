"""Experts stored as one stack a layer: `gate_up_proj [E, 2I, H]`, `down_proj [E, H, I]`, or both transposed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from coterie.activations import Activation
from coterie.checkpoints.codes import Codes
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.gate_up import join_gate_up, split_gate_up
from coterie.checkpoints.hf_separate import refuse_other_kinds
from coterie.checkpoints.naming import FUSED, UNGATED, LayerNames, names_tried
from coterie.checkpoints.reader import LayerReader
from coterie.checkpoints.scheme import Scheme
from coterie.checkpoints.schemes import choose
from coterie.checkpoints.tensorfile import PLAIN_DTYPES
from coterie.errors import CheckpointError, MissingTensorError


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedExperts(LayerReader):
    """One layer of stacked tensors. `first` names gate and up (up alone without a gate), `down` the other.

    transposed: stored [E, in, out]. interleaved: gate and up alternate, else gate comes first.
    """

    folder: Folder
    first: str
    down: str
    transposed: bool
    interleaved: bool
    scheme: Scheme

    def _split(self, both: Tensor, dim: int) -> dict[str, Tensor]:
        """gate and up out of the dimension that holds both."""
        if not self.has_gate:
            return {"up": both}
        gate, up = split_gate_up(both, dim, self.interleaved)
        return {"gate": gate, "up": up}

    def expert(self, expert: int) -> dict[str, Tensor | Codes]:
        first, down = (self.scheme.read(self.folder, base, expert) for base in (self.first, self.down))
        if isinstance(first, Codes):
            parts = ("gate", "up") if self.has_gate else ("up",)
            halves = {part: first.each(lambda t, part=part: self._split(t, 0)[part].contiguous()) for part in parts}
            return halves | {"down": down}
        if self.transposed:
            first, down = first.T, down.T
        weights = self._split(first, 0) | {"down": down}
        return {part: weight if weight.stride(1) == 1 else weight.contiguous() for part, weight in weights.items()}

    def stored(self, expert: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        first, down = weights["up"], weights["down"]
        if self.has_gate:
            first = join_gate_up(weights["gate"], first, 0, self.interleaved)
        return {self.first: first.T, self.down: down.T} if self.transposed else {self.first: first, self.down: down}

    def biases(self) -> dict[str, Tensor]:
        if not self.biased:
            return {}
        biases = self._split(self.folder.tensor(f"{self.first}_bias"), 1)
        biases["down"] = self.folder.tensor(f"{self.down}_bias")
        return {part: bias.float().contiguous() for part, bias in biases.items()}

    def release(self, expert: int) -> None:
        for base in (self.first, self.down):
            self.scheme.release(self.folder, base, expert, self.num_experts)


def open_fused(
    folder: Folder, names: LayerNames, activation: Activation, interleaved: bool, schemes: Sequence[Scheme]
) -> FusedExperts:
    """Reads the layout off the two shapes. Raises CheckpointError when they fit neither layout."""
    pair = next((pair for pair in FUSED if names.leaves == set(pair)), None)
    if pair is None or (pair == UNGATED) == names.has_gate:
        raise MissingTensorError(
            f"{folder.path}, {names.stem}: found only {', '.join(sorted(names.leaves))} of a layer's experts; "
            f"the names tried: {', '.join(names_tried(names.stem))}"
        )
    first, down = (f"{names.stem}.{leaf}" for leaf in pair)
    folds = 2 if names.has_gate else 1
    scheme = choose(schemes, folder, first, stacked=True)
    experts, *found = scheme.size(folder, first, stacked=True)
    _, rows, columns = scheme.size(folder, down, stacked=True)
    if found == [folds * columns, rows]:
        transposed, hidden, intermediate = False, rows, columns
    elif found == [columns, folds * rows] and scheme.spec is None:
        transposed, hidden, intermediate = True, columns, rows
    else:
        raise CheckpointError(
            f"{folder.file_of(first + scheme.codes.suffix).path}, tensors {first} {[experts, *found]} and "
            f"{down} {[_, rows, columns]}: expected [E, {folds}I, H] and [E, H, I]"
            + (f", or [E, H, {folds}I] and [E, I, H]" if scheme.spec is None else "")
        )
    for base, size in ((first, (experts, *found)), (down, (experts, rows, columns))):
        scheme.check(folder, base, size)
        if scheme.spec is not None:
            refuse_other_kinds(folder, base, names.kinds, scheme, bias="_bias")
    biased = f"{first}_bias" in folder.shard_of
    if biased:
        folder.expect(f"{first}_bias", (experts, folds * intermediate), PLAIN_DTYPES)
        folder.expect(f"{down}_bias", (experts, hidden), PLAIN_DTYPES)
    return FusedExperts(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        has_gate=names.has_gate,
        biased=(("gate",) if names.has_gate else ()) + ("up", "down") if biased else (),
        activation=activation,
        specs={"gate_up": (scheme.spec,), "down": (scheme.spec,)},
        tensors=(
            *scheme.names(folder, first),
            *scheme.names(folder, down),
            *((f"{first}_bias", f"{down}_bias") if biased else ()),
        ),
        nbytes=scheme.nbytes(folder, first) + scheme.nbytes(folder, down),
        folder=folder,
        first=first,
        down=down,
        transposed=transposed,
        interleaved=interleaved,
        scheme=scheme,
    )
