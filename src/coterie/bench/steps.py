"""Training steps of one side of a comparison, timed and weighed in the process that makes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from coterie.bench.memory import peak_rise
from coterie.bench.timing import median_seconds
from coterie.hf.modules import packed_modules
from coterie.hf.weight import PackedWeight

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


@dataclass(frozen=True, slots=True)
class Weight:
    """What a training step takes, in bytes."""

    frozen: int  # the weights that are not trained, packed or not
    trained: int  # LoRA's parameters
    peak: int  # what a step takes above what stays: these, the optimizer's state, and its input


class Steps(ABC):
    """Training steps; `frozen` and `trained` are bytes of weights that stay."""

    frozen: int
    trained: int

    @abstractmethod
    def prepare(self, tokens: int) -> None:
        """Make the input of the steps that follow."""

    @abstractmethod
    def step(self, number: int = 0) -> None:
        """Forward and backward, and whatever else a step is; nothing of it stays but what the next one reuses."""

    def weigh(self, tokens: int) -> Weight:
        """The memory of the first step of so many tokens, after a step of one has loaded what steps need of code."""
        self.prepare(1)
        self.step()
        self.prepare(tokens)
        return Weight(self.frozen, self.trained, peak_rise(self.step))

    def seconds(self, tokens: int, seconds: float) -> float:
        """Median seconds of the steps of so many tokens that fit in `seconds`, one at least."""
        self.prepare(tokens)
        return median_seconds(self.step, seconds, least=1)


def with_lora(module: Any, rank: int, modules: list[str] | None = None) -> Any:
    """`module` under PEFT's LoRA on experts and `modules`, of random values, the same every time: a new B is zero."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, target_parameters=PARAMETERS)
    model = get_peft_model(module, config)
    random = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.02, generator=random)
    return model


def frozen_and_trained(module: torch.nn.Module) -> tuple[int, int]:
    """Bytes of a module's parameters: (frozen, trained). Packed experts count what they take in memory."""
    plain = [p for p in module.parameters() if not isinstance(p, PackedWeight)]
    packed = sum(part.experts.nbytes for _, part in packed_modules(module))
    trained = sum(p.nbytes for p in plain if p.requires_grad)
    return packed + sum(p.nbytes for p in plain) - trained, trained
