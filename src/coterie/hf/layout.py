"""How an experts module of Transformers holds its weights, read off its flags and shapes; no table of models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coterie.activations import Activation
from coterie.checkpoints.gate_up import join_gate_up, split_gate_up
from coterie.checkpoints.packed import PackedLayer
from coterie.checkpoints.reader import LayerReader
from coterie.errors import CheckpointError, UnsupportedModelError
from coterie.hf.gate import probe

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_is_expert_parallel")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def is_experts(module: nn.Module) -> bool:
    """Whether `module` is an experts module that Transformers dispatches through its experts interface."""
    return all(hasattr(module, flag) for flag in FLAGS)


@dataclass(frozen=True, slots=True)
class Layout:
    """The experts of one module: E experts of hidden size H and intermediate size I.

    `first` is the parameter in front of the activation: `gate_up_proj` [E, 2I, H], or `up_proj` [E, I, H] without a
    gate; `down_proj` is [E, H, I]. `is_transposed` swaps the last two sizes; `is_concatenated` says gate before up,
    otherwise they alternate. With biases there are `{first}_bias` [E, 2I] and `down_proj_bias` [E, H].
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: Activation
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool

    @property
    def first(self) -> str:
        return "gate_up_proj" if self.has_gate else "up_proj"

    @property
    def weights(self) -> tuple[str, str]:
        """The names of the weight parameters."""
        return self.first, "down_proj"

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of all parameters that packing takes over, in the order in which the module registers them."""
        if not self.has_bias:
            return self.weights
        return self.first, f"{self.first}_bias", "down_proj", "down_proj_bias"

    def projections_of(self, name: str) -> tuple[str, ...]:
        """The projections that parameter `name` holds."""
        if name.startswith("down_proj"):
            return ("down",)
        return ("gate", "up") if self.has_gate else ("up",)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of parameter `name` as the module has it."""
        rows, cols = self.hidden_size, self.intermediate_size
        if name.startswith(self.first):
            rows, cols = self.intermediate_size * (2 if self.has_gate else 1), self.hidden_size
        if name.endswith("_bias"):
            return self.num_experts, rows
        return (self.num_experts, cols, rows) if self.is_transposed else (self.num_experts, rows, cols)

    def check_found(self, where: str, found: LayerReader | PackedLayer) -> None:
        """Raises CheckpointError, saying where, unless the experts of a checkpoint are those of the module."""
        for what in ("num_experts", "hidden_size", "intermediate_size", "has_gate", "activation"):
            if getattr(found, what) != getattr(self, what):
                raise CheckpointError(
                    f"{where}: {what} is {getattr(found, what)}, config.json says {getattr(self, what)}"
                )
        if bool(found.biased) != self.has_bias:
            raise CheckpointError(f"{where}: {'has' if found.biased else 'has no'} biases, unlike the model")

    def split_weight(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """One expert of weight `name`, 2-D as the module has it -> {projection: [rows, cols]}, columns adjacent."""
        parts = self._split(name, weight.T if self.is_transposed else weight)
        return {part: w if w.stride(1) == 1 else w.contiguous() for part, w in parts.items()}

    def split_bias(self, name: str, bias: Tensor) -> dict[str, Tensor]:
        """Bias `name` of all experts [E, rows] -> {projection: [E, rows]} float32."""
        return {part: b.T.float().contiguous() for part, b in self._split(name, bias.T).items()}

    def split_lora_b(self, name: str, b: Tensor) -> dict[str, Tensor]:
        """LoRA's B of weight `name` of all experts [E, rows, R] -> {projection: [E, rows, R]}."""
        return {part: w.transpose(0, 1) for part, w in self._split(name, b.transpose(0, 1)).items()}

    def join_weight(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        """The inverse of `split_weight`."""
        weight = self._join(name, parts)
        return weight.T.contiguous() if self.is_transposed else weight

    def join_bias(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        """The inverse of `split_bias`."""
        return self._join(name, {part: b.T for part, b in parts.items()}).T.contiguous()

    def _split(self, name: str, rows_first: Tensor) -> dict[str, Tensor]:
        if name.startswith("down_proj"):
            return {"down": rows_first}
        if not self.has_gate:
            return {"up": rows_first}
        gate, up = split_gate_up(rows_first, 0, not self.is_concatenated)
        return {"gate": gate, "up": up}

    def _join(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        if name.startswith("down_proj"):
            return parts["down"]
        if not self.has_gate:
            return parts["up"]
        return join_gate_up(parts["gate"], parts["up"], 0, not self.is_concatenated)


def read_layout(module: nn.Module) -> Layout:
    """The layout of an experts module (its parameters may be on the meta device).

    Raises UnsupportedModelError, naming the module's class and the reason, for experts that no kernel computes.
    """
    name = type(module).__name__

    def unsupported(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{name} is not supported: {reason}")

    missing = [flag for flag in FLAGS if not hasattr(module, flag)]
    if missing:
        raise unsupported(f"it does not use Transformers' experts interface (it has no {', '.join(missing)})")
    if getattr(module, "has_post_expert_norm", False):  # a flag since Transformers 5.20
        raise unsupported("it normalises each expert's output before the weighted sum")
    first = "gate_up_proj" if module.has_gate else "up_proj"
    names = [first, "down_proj"]
    if module.has_bias:
        names = [first, f"{first}_bias", "down_proj", "down_proj_bias"]
    parameters = dict(module.named_parameters(recurse=False))
    absent = [n for n in names if n not in parameters]
    if absent:
        raise unsupported(f"expected parameters {', '.join(names)}, found {', '.join(parameters) or 'none'}")
    extra = [n for n in parameters if n not in names]
    if extra:
        raise unsupported(f"it has parameters that no kernel reads: {', '.join(extra)}")
    for n in names:
        if parameters[n].dtype not in DTYPES:
            raise unsupported(f"{n} is {parameters[n].dtype}, expected bfloat16, float16 or float32")

    down = tuple(parameters["down_proj"].shape)
    if len(down) != 3:
        raise unsupported(f"down_proj has shape {list(down)}, expected three sizes")
    experts, hidden, intermediate = (down[0], down[2], down[1]) if module.is_transposed else down
    activation = probe(module, module.has_gate, module.is_concatenated)
    if activation is None:
        what = "_apply_gate" if module.has_gate else "act_fn"
        act = type(getattr(module, "act_fn", None)).__name__
        raise unsupported(
            f"its {what} (activation {act}) is none of silu, gelu, gelu_tanh, relu, relu2, clamped or not, times up"
        )
    layout = Layout(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        activation=activation,
        has_gate=module.has_gate,
        has_bias=module.has_bias,
        is_transposed=module.is_transposed,
        is_concatenated=module.is_concatenated,
    )
    for n in names:
        if tuple(parameters[n].shape) != layout.shape(n):
            raise unsupported(f"{n} has shape {list(parameters[n].shape)}, expected {list(layout.shape(n))}")
    return layout
