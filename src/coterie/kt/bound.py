"""The caller's LoRA: tensors that are read where they lie, and where their gradients go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from coterie.errors import ArgumentError
from coterie.lora import ExpertLora

NAMES = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")


def shapes(experts: int, hidden: int, intermediate: int, rank: int) -> dict[str, tuple[int, int, int]]:
    """The shape of each factor."""
    a, b, turned_a, turned_b = (rank, hidden), (intermediate, rank), (rank, intermediate), (hidden, rank)
    return {name: (experts, *s) for name, s in zip(NAMES, (a, b, a, b, turned_a, turned_b), strict=True)}


class BoundLora:
    """The factors by name, and tensors for their gradients where the caller gave some."""

    def __init__(self, factors: Mapping[str, Tensor], gradients: Mapping[str, Tensor], scaling: float):
        self.factors, self._gradients = dict(factors), dict(gradients)
        self.lora = ExpertLora(
            gate_a=factors["gate_lora_a"],
            gate_b=factors["gate_lora_b"],
            up_a=factors["up_lora_a"],
            up_b=factors["up_lora_b"],
            down_a=factors["down_lora_a"],
            down_b=factors["down_lora_b"],
            scaling=scaling,
        )

    def publish(self, gradients: Sequence[Tensor]) -> None:
        """Hands out the gradients of one backward, of the factors in their order.

        A factor that requires grad is a parameter: its gradient is added to its `.grad`, or becomes it. Any other's
        replaces what is in the tensor for it, if there is one.
        """
        for (name, factor), gradient in zip(self.factors.items(), gradients, strict=True):
            target = self._gradients.get(name)
            if factor.requires_grad and factor.grad is not None:
                factor.grad.add_(gradient)
                continue
            if target is not None:
                gradient = target.copy_(gradient)
            if factor.requires_grad:
                factor.grad = gradient


def check_shapes(given: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], prefix: str = "") -> None:
    """Raises ArgumentError, with the tensor's name, for another shape."""
    for name, shape in expected.items():
        found = tuple(given[name].shape)
        if found != shape:
            raise ArgumentError(f"{prefix}{name}: expected shape {list(shape)}, found {list(found)}")


def check_names(parameters: Mapping[str, Tensor]) -> None:
    """Raises ArgumentError for a name that is none of the factors'."""
    unknown = [name for name in parameters if name not in NAMES]
    if unknown:
        raise ArgumentError(f"lora_params: expected names {', '.join(NAMES)}; found {unknown[0]!r}")


def add_to_parameters(parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
    """Adds gradients, "grad_" and the name of a factor, to `.grad` of the parameters of that name."""
    for name, parameter in parameters.items():
        gradient = gradients.get(f"grad_{name}")
        if gradient is not None:
            parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
