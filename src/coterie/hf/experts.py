"""The experts implementation "coterie" of Transformers' experts interface."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from coterie.errors import ArgumentError, UnsupportedModelError
from coterie.experts import Experts
from coterie.hf.layout import Layout, read_layout
from coterie.hf.modules import attach, packed_module, show_dense
from coterie.hf.packed import PackedModule

if TYPE_CHECKING:
    from coterie.lora import ExpertLora

NAME = "coterie"
logger = logging.getLogger(__name__)


def experts_forward(
    self: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    lora: ExpertLora | None = None,
) -> Tensor:
    """The weighted sum of each token's experts: [T, H], [T, K] int64, [T, K] -> [T, H] in the dtype of `hidden_states`.

    A module whose parameters are still its own is packed first (see `pack_module`). `lora` is what PEFT's adapters add.
    """
    if self._is_expert_parallel:
        raise UnsupportedModelError(
            f"{type(self).__name__} is under expert parallelism; coterie computes all experts in each process: "
            'leave ep_size and enable_expert_parallel out, or use experts_implementation="grouped_mm"'
        )
    packed = packed_module(self)
    if packed is None:
        packed = pack_module(self)
    elif self.training:
        check_frozen(self, packed.layout)
    return packed.experts(hidden_states, top_k_index, top_k_weights, lora=lora)


@torch.compiler.disable
def pack_module(module: nn.Module) -> PackedModule:
    """Packs an experts module as bf16 from its own parameters, which it frees: each is replaced by a `PackedWeight`.

    Packed bf16 weights are read back exactly, so nothing is lost where the parameters were bf16: `state_dict`,
    `save_pretrained` and the other experts implementations go on working, from the packed copy. fp16 and f32 parameters
    are rounded to bf16, with a warning. Raises UnsupportedModelError for experts that cannot be computed, ArgumentError
    while they are being trained or are not in CPU memory.
    """
    layout = read_layout(module)
    name = type(module).__name__
    check_frozen(module, layout)
    parameters = {parameter: getattr(module, parameter) for parameter in layout.parameters}
    device = parameters["down_proj"].device
    if device.type != "cpu":
        raise ArgumentError(
            f"the weights of {name} are on {device}; coterie packs in CPU memory: model.to('cpu') first"
        )
    dtype = parameters["down_proj"].dtype
    if dtype != torch.bfloat16:
        logger.warning("packing %s rounds its %s weights to bfloat16", name, str(dtype).removeprefix("torch."))
    experts = Experts.empty(
        layout.num_experts,
        layout.hidden_size,
        layout.intermediate_size,
        format="bf16",
        activation=layout.activation,
        has_gate=layout.has_gate,
    )
    biases = {}
    for parameter, value in parameters.items():
        value = value.detach()
        if parameter.endswith("_bias"):
            biases |= layout.split_bias(parameter, value)
            continue
        for expert in range(layout.num_experts):
            for projection, weight in layout.split_weight(parameter, value[expert]).items():
                experts.pack_projection(projection, expert, weight)
    if biases:
        experts.set_biases(**biases)
    show_dense(module)
    packed = attach(module, experts, layout)
    for parameter, value in parameters.items():
        # Still what was to be trained, packed in an evaluation: `check_frozen` says so when training begins.
        module._parameters[parameter].requires_grad_(value.requires_grad)
    return packed


def check_frozen(module: nn.Module, layout: Layout) -> None:
    """Raises ArgumentError while the weights of an experts module are to be trained: packed, they would not learn."""
    training = module.training and torch.is_grad_enabled()
    if training and any(module._parameters[parameter].requires_grad for parameter in layout.parameters):
        raise ArgumentError(
            f"the weights of {type(module).__name__} are being trained (training mode, requires_grad); coterie "
            "computes frozen experts: call model.requires_grad_(False) before anything else is made trainable, or "
            'model.eval(), or load the model with experts_implementation="grouped_mm"'
        )


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
