"""The engine's side of a layer of experts: what the operators find by its handle, and which arithmetic it uses."""

from __future__ import annotations

from torch import Tensor

from . import _native, handles
from .activations import Activation
from .arithmetic import Arithmetic
from .border import BYTES, F32, address
from .formats import PANEL_ROWS, Formats, round_up

PROJECTIONS = ("gate", "up", "down")  # in the order of the engine's numbers


class Layer(Arithmetic, _native.Layer):
    """Packed experts as the kernels see them; keeps alive what they read."""

    def __init__(
        self,
        formats: Formats,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: Activation,
        has_gate: bool,
    ) -> None:
        number = handles.new_number()
        up, down = formats.layouts(hidden_size, intermediate_size)
        super().__init__(number, up, down, activation.native(), num_experts, has_gate)
        self._layouts = up, down, has_gate
        self.formats, self.num_experts, self.allows_int8 = formats, num_experts, formats.int8_activations
        self.hidden_size, self.intermediate_size, self.has_gate = hidden_size, intermediate_size, has_gate
        handles.register(number, self)

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one packed expert."""
        return self.formats.expert_nbytes(self.hidden_size, self.intermediate_size, self.has_gate)

    def place(self, pages: Tensor) -> None:
        """Where there are several NUMA nodes: has fresh memory for experts lie on the nodes that compute them."""
        count = pages.numel() // self.expert_nbytes
        memory = address("memory for experts", pages, BYTES, (count * self.expert_nbytes,))
        _native.place(*self._layouts, count, self.expert_nbytes, memory)

    def located(self, expert: int, data: Tensor) -> list[tuple[int, int, int]]:
        """(node that computes them, node that holds them or -1, bytes) of the packed matrices of one expert."""
        size = self.expert_nbytes
        return _native.locate(*self._layouts, size, address(f"expert {expert}", data, BYTES, (size,)))

    def set_weights(self, expert: int, data: Tensor) -> None:
        """The packed matrices of one expert, back to back, used where they lie."""
        self.set_expert(expert, address(f"expert {expert}", data, BYTES, (self.expert_nbytes,)), data)

    def set_biases(self, projection: str, bias: Tensor | None) -> None:
        """Biases of one projection, float32 [E, rows padded to panels], used where they lie; None for none."""
        rows = round_up(self.hidden_size if projection == "down" else self.intermediate_size, PANEL_ROWS)
        at = 0 if bias is None else address(f"{projection} bias", bias, F32, (self.num_experts, rows))
        self.set_bias(PROJECTIONS.index(projection), at, bias)
