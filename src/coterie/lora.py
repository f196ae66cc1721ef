"""LoRA of one layer's experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import ArgumentError

if TYPE_CHECKING:
    from .experts import Experts


@dataclass(slots=True)
class ExpertLora:
    """Adapters of gate, up and down: ``y = W x + scaling * B (A x)``; a pair that is None adapts nothing.

    Attributes:
        gate_a, up_a: [E, R, H]; the same tensor where gate and up share one A, as in PEFT's fused gate_up_proj.
        gate_b, up_b: [E, I, R].
        down_a: [E, R, I]. down_b: [E, H, R]. The rank R may differ between projections.
        scaling: one factor, or one each for gate, up and down.

    Float tensors on the CPU, of any strides; their gradients come in their own dtype, accumulated in float32.
    """

    gate_a: Tensor | None = None
    gate_b: Tensor | None = None
    up_a: Tensor | None = None
    up_b: Tensor | None = None
    down_a: Tensor | None = None
    down_b: Tensor | None = None
    scaling: float | tuple[float, float, float] = 1.0

    def pairs(self) -> dict[str, tuple[Tensor | None, Tensor | None]]:
        """(A, B) by projection."""
        return {"gate": (self.gate_a, self.gate_b), "up": (self.up_a, self.up_b), "down": (self.down_a, self.down_b)}

    def factors(self) -> tuple[Tensor | None, ...]:
        """A and B of gate, up and down, one after the other."""
        return self.gate_a, self.gate_b, self.up_a, self.up_b, self.down_a, self.down_b

    def scalings(self) -> list[float]:
        """Factors of gate, up and down."""
        given = self.scaling
        return [float(s) for s in given] if isinstance(given, (tuple, list)) else [float(given)] * 3

    def check(self, experts: Experts) -> None:
        """Raise ArgumentError unless the adapters fit these experts, wherever they are."""
        if len(self.scalings()) != 3:
            raise ArgumentError(f"scaling: expected one number or three, found {len(self.scalings())}")
        for name, (a, b) in self.pairs().items():
            if a is None and b is None:
                continue
            if a is None or b is None:
                raise ArgumentError(f"LoRA of {name}: expected both A and B, found only {'B' if a is None else 'A'}")
            if name not in experts.projections:
                raise ArgumentError(f"LoRA of {name}: these experts have no {name}")
            rows, cols = experts.shape(name)
            rank = a.shape[1] if a.dim() == 3 else 0
            if rank < 1:
                raise ArgumentError(f"{name}_a: expected shape [experts, rank >= 1, {cols}], found {list(a.shape)}")
            count = experts.num_experts
            for label, tensor, shape in (("a", a, (count, rank, cols)), ("b", b, (count, rows, rank))):
                if tuple(tensor.shape) != shape:
                    raise ArgumentError(f"{name}_{label}: expected shape {list(shape)}, found {list(tensor.shape)}")
                if tensor.dtype not in (torch.bfloat16, torch.float32, torch.float16):
                    raise ArgumentError(f"{name}_{label}: expected bfloat16, float32 or float16, found {tensor.dtype}")
