"""The packed experts that stand in an experts module."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.experts import Experts
from coterie.hf.layout import Layout


@dataclass(frozen=True, slots=True, eq=False)
class PackedModule:
    """Packed experts and the layout of the module they stand in. Never changes, so copies of a module share it."""

    experts: Experts
    layout: Layout

    def __deepcopy__(self, memo: dict) -> PackedModule:
        return self

    @property
    def format(self) -> str:
        return self.experts.format

    def shape(self, name: str) -> tuple[int, ...]:
        """That of parameter `name`."""
        return self.layout.shape(name)

    def extra_repr(self) -> str:
        """What print(model) says of it."""
        layout = self.layout
        sizes = f"num_experts={layout.num_experts}, hidden_size={layout.hidden_size}"
        packed = f"packed as {self.experts.formats.described}, {self.experts.nbytes / 1e6:,.1f} MB"
        return f"{sizes}, intermediate_size={layout.intermediate_size}, {packed}"

    def dense_expert(self, name: str, expert: int, dtype: torch.dtype) -> Tensor:
        """One expert of weight `name`, dequantised: 2-D as the module had it."""
        parts = {p: self.experts.dequantize_projection(p, expert) for p in self.layout.projections_of(name)}
        return self.layout.join_weight(name, parts).to(dtype)

    def dense(self, name: str, dtype: torch.dtype) -> Tensor:
        """Parameter `name`, dequantised, as the module had it."""
        if name.endswith("_bias"):
            biases = self.experts.biases()
            return self.layout.join_bias(name, {p: biases[p] for p in self.layout.projections_of(name)}).to(dtype)
        dense = torch.empty(self.layout.shape(name), dtype=dtype, device="cpu")
        for expert in range(self.layout.num_experts):
            dense[expert] = self.dense_expert(name, expert, dtype)
        return dense
