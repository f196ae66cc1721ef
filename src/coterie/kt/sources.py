"""Where the weights of a layer come from, an expert at a time: a checkpoint, packed or not, or dense tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from coterie.activations import Activation
from coterie.checkpoints import LayerReader, PackedFile, open_layer, open_reader, packed
from coterie.checkpoints.gguf_file import find_gguf
from coterie.errors import ArgumentError, CheckpointError
from coterie.experts import REPACKED, Experts
from coterie.formats import Formats, resolve
from coterie.kt.methods import Method


class Source(ABC):
    """The experts of one layer, numbered as the model numbers them.

    Attributes:
        num_experts, hidden_size, intermediate_size, has_gate, activation: what the layer is.
        formats: the formats to pack into.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    activation: Activation
    formats: Formats

    @abstractmethod
    def read(self, expert: int, into: Experts, place: int) -> None:
        """Packs expert `expert` as number `place` of `into`."""

    def biases(self) -> dict[str, Tensor]:
        """Of all experts, float32 [E, rows] by projection; empty where there are none."""
        return {}

    def notice(self) -> str | None:
        """What of the experts that were read could not be kept as it is; None where that is nothing."""
        return None


class Packed(Source):
    """A layer of a packed checkpoint. Raises CheckpointError where it is packed in another format than the method's, if
    that has one."""

    def __init__(self, file: PackedFile, method: Method):
        layout = file.layout
        found = layout.formats.name
        if found != method.spec.name and not method.keeps:
            raise CheckpointError(
                f"{file.file.path} is packed as {found}, method {method.name} expects {method.spec.name}: choose a "
                f"method of {found}, or convert the original checkpoint again"
            )
        self.num_experts, self.hidden_size = layout.num_experts, layout.hidden_size
        self.intermediate_size, self.has_gate = layout.intermediate_size, layout.has_gate
        self.activation, self.formats, self._file = layout.activation, layout.formats, file

    def read(self, expert: int, into: Experts, place: int) -> None:
        self._file.read_into(expert, into.packed(place))

    def biases(self) -> dict[str, Tensor]:
        return self._file.biases()


class Unpacked(Source):
    """A layer of any other checkpoint: codes of the method's format, or of any, are kept as they are, all else is
    packed."""

    def __init__(self, layer: LayerReader, method: Method):
        self.num_experts, self.hidden_size = layer.num_experts, layer.hidden_size
        self.intermediate_size, self.has_gate = layer.intermediate_size, layer.has_gate
        self.activation, self._layer, self._errors = layer.activation, layer, list[float]()
        own = layer.formats
        if method.keeps:
            self.formats = own or Formats.of(resolve("bf16"))
        else:
            self.formats = own if own is not None and own.name == method.spec.name else Formats.of(method.spec)

    def read(self, expert: int, into: Experts, place: int) -> None:
        for name, weight in self._layer.expert(expert).items():
            error = into.pack_stored(name, place, weight)
            if self.formats == self._layer.formats and not self._layer.held(name, weight):
                self._errors.append(error)
        self._layer.release(expert)

    def notice(self) -> str | None:
        if not self._errors:
            return None
        error = sum(self._errors) / len(self._errors)
        return REPACKED.format(odd=self._layer.odd, format=self.formats.name, error=error)

    def biases(self) -> dict[str, Tensor]:
        return self._layer.biases()


class Dense(Source):
    """gate and up [E,I,H], down [E,H,I], bf16, fp16 or float32, on any device. Raises ArgumentError."""

    has_gate, activation = True, Activation()

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, method: Method):
        if up.dim() != 3:
            raise ArgumentError(f"up_proj: expected [experts, intermediate, hidden], found shape {list(up.shape)}")
        self.num_experts, self.intermediate_size, self.hidden_size = up.shape
        turned = up.shape[0], up.shape[2], up.shape[1]
        for name, tensor, shape in (("gate_proj", gate, tuple(up.shape)), ("down_proj", down, turned)):
            if tuple(tensor.shape) != shape:
                raise ArgumentError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")
        self.formats, self._dense = Formats.of(method.spec), {"gate": gate, "up": up, "down": down}

    def read(self, expert: int, into: Experts, place: int) -> None:
        for name, stack in self._dense.items():
            into.pack_projection(name, place, stack[expert].detach().cpu().contiguous())


def open_source(path: str, layer: int, method: Method) -> Source:
    """A layer of the checkpoint at `path`. Raises CheckpointError, before reading any weight."""
    if packed(path):
        return Packed(open_layer(path, layer), method)
    if method.keeps and find_gguf(path) is None:
        raise CheckpointError(
            f"{path}: method {method.name} keeps the weights of GGUF files and of packed checkpoints, and this is "
            "neither: choose the method of the format that it is to be packed in, or give the path of a GGUF file"
        )
    return Unpacked(open_reader(path).layer(layer), method)
