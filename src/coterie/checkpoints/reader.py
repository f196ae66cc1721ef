"""What every reader of a checkpoint format gives: the experts of a layer, one at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from coterie.activations import Activation
from coterie.checkpoints.codes import Codes
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.scheme import Scheme
from coterie.formats import Format, Formats, resolve


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerReader(ABC):
    """The experts of one layer of a checkpoint. Everything but the weights' values was checked when it was made.

    num_experts (E), hidden_size (H), intermediate_size (I), has_gate, biased (those of gate,
    up, down that have biases) and activation say what the layer is; `specs` are the formats of its matrices, those of
    "gate_up" and those of "down", each once, None for plain ones;
    `tensors` names every tensor it is made of, `nbytes` counts the bytes of its weights as stored; `odd` says in words
    which of them no format holds as they are.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    biased: tuple[str, ...]
    activation: Activation
    specs: Mapping[str, tuple[Format | None, ...]]
    tensors: tuple[str, ...]
    nbytes: int
    odd: str = "columns in act-order, or 8 bits with zero points"

    def held(self, projection: str, weight: Tensor | Codes) -> bool:
        """Whether one of the layer's own formats holds a matrix that `expert` gave as it is."""
        specs = self.specs["down" if projection == "down" else "gate_up"]
        return weight.held and weight.spec in specs if isinstance(weight, Codes) else None in specs

    @property
    def kinds(self) -> tuple[Format | None, ...]:
        """The formats of all matrices, each once, None for plain ones."""
        return tuple(dict.fromkeys(spec for specs in self.specs.values() for spec in specs))

    @property
    def formats(self) -> Formats | None:
        """The formats that hold the layer: where several are mixed in gate and up, or in down, bf16, as for what is
        plain beside others; None where all is plain."""
        if self.kinds == (None,):
            return None
        one = {part: specs[0] if len(specs) == 1 else None for part, specs in self.specs.items()}
        return Formats(one["gate_up"] or resolve("bf16"), one["down"] or resolve("bf16"))

    @abstractmethod
    def expert(self, expert: int) -> dict[str, Tensor | Codes]:
        """The weights of one expert: {"gate": [I, H], "up": [I, H], "down": [H, I]}, no "gate" where has_gate is False.

        Floating point, rows contiguous; views of the mapped file wherever the stored layout allows. Where they are
        quantised, `Codes`.
        """

    @abstractmethod
    def stored(self, expert: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `expert` where the weights are plain: what the checkpoint stores of it, by tensor name; of a
        stack, its slice of it."""

    @abstractmethod
    def biases(self) -> dict[str, Tensor]:
        """The biases of `biased`, float32: of {"gate": [E, I], "up": [E, I], "down": [E, H]}."""

    @abstractmethod
    def release(self, expert: int) -> None:
        """Lets go of the memory that reading that expert took; views of it stay valid."""


class Reader(ABC):
    """A checkpoint whose experts can be read. One subclass a format.

    folder: None where it is no folder as Hugging Face lays them out.
    schemes: how its quantised matrices may be stored; () where its config does not say that any is.
    experts_per_token: how many experts a token is sent to; None where that is not said.
    """

    folder: Folder | None
    schemes: tuple[Scheme, ...]
    experts_per_token: int | None

    @property
    @abstractmethod
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers that have experts, ascending."""

    @abstractmethod
    def layer(self, layer: int) -> LayerReader:
        """The reader of one layer; raises CheckpointError when the layer is not whole, before reading any weight."""


def spans(numbers: tuple[int, ...]) -> str:
    """Ascending numbers in few words: "0-3, 5"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
