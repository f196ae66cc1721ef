"""The forward of a layer whose experts are partly on a device and partly in RAM."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coterie import ops
from coterie.errors import StateError
from coterie.gpu import offload
from coterie.gpu.resident import Pair, Resident
from coterie.lora import ExpertLora

if TYPE_CHECKING:
    from coterie.experts import Experts


@dataclass(frozen=True, slots=True)
class Placement:
    """Which of a layer's E experts are on a device, and these.

    experts: their numbers, ascending; index: the same on the device. slots: on the device too, int64 [E + 2]: which of
    its experts an id of -1 .. E is, or -1. process: whose they are; what it forks cannot use its device.
    """

    experts: tuple[int, ...]
    index: Tensor
    slots: Tensor
    resident: Resident
    process: int = field(default_factory=os.getpid)

    @classmethod
    def of(cls, resident: Resident, experts: tuple[int, ...], num_experts: int) -> Placement:
        index = torch.tensor(experts, device="cpu")
        slots = torch.full((num_experts + 2,), -1, device="cpu")
        slots[index + 1] = torch.arange(len(experts), device="cpu")
        return cls(experts, index.to(resident.device), slots.to(resident.device), resident)

    def check_process(self) -> None:
        """Raises StateError in a process that was forked after the experts were moved."""
        if os.getpid() != self.process:
            raise StateError(
                f"the experts are on {self.resident.device}, which a forked process cannot use: compute where the "
                "model was loaded (workers of a DataLoader only read rows), or load it in processes that are spawned"
            )

    @property
    def whole(self) -> bool:
        """Whether all experts are on the device."""
        return len(self.experts) == len(self.slots) - 2

    def positions(self, ids: Tensor) -> Tensor:
        """Which of the device's experts an id stands for; -1 for the others. Ids out of range fail as torch's do."""
        return self.slots[:-1].index_select(0, ids.flatten().long() + 1).view(ids.shape)

    def dequantize(self, name: str, expert: int) -> Tensor:
        """Float32 [rows, cols] in RAM: the values one packed matrix of the device stands for."""
        index = torch.tensor([self.experts.index(expert)], device=self.resident.device)
        return self.resident.dense((name,), index, torch.float32)[0].to("cpu")

    def pairs(self, lora: ExpertLora) -> dict[str, Pair]:
        """A and B of the device's experts, copied there."""
        return {
            name: (self._own(a), self._own(b), scaling)
            for (name, (a, b)), scaling in zip(lora.pairs().items(), lora.scalings(), strict=True)
            if a is not None and b is not None
        }

    def _own(self, factor: Tensor) -> Tensor:
        if not self.whole:
            there = factor.device == self.index.device
            index = self.index if there else torch.tensor(self.experts, device=factor.device)
            factor = factor.index_select(0, index)
        return factor.to(self.resident.device)


@torch.compiler.disable
def forward(
    experts: Experts, placement: Placement, x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None
) -> Tensor:
    """See Experts.__call__. Experts in RAM compute while those on the device do; the two sums are added there.

    Ids out of range raise ArgumentError where experts are in RAM; else they fail as torch's own indexing does there.
    """
    resident = placement.resident
    placement.check_process()
    ops.check_batch(experts, x, ids, weights, resident.device)
    lora = lora or ExpertLora()
    lora.check(experts)
    pairs = placement.pairs(lora)
    if placement.whole:
        return resident.forward(x, placement.positions(ids), weights, pairs)
    here = placement.slots.index_select(0, ids.clamp(-1, experts.num_experts).flatten().long() + 1).view(ids.shape) >= 0
    found: list[Tensor] = []

    def compute() -> None:
        positions = placement.positions(ids.where(here, -1))
        found.append(resident.forward(x, positions, weights, pairs))

    in_ram = offload.forward(experts, x, ids.where(~here, -1), weights, lora, compute)
    return in_ram + found[0]
