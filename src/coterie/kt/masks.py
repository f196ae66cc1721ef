"""Which experts are worth a place on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.errors import ArgumentError


def generate_gpu_experts_masks(activation_freq: Tensor, num_gpu_experts: int) -> Tensor:
    """The globally hottest experts: bool [L, E] on the CPU, True for the `num_gpu_experts` largest frequencies.

    Args:
        activation_freq: [L, E], how often each expert of each layer is chosen. Of equal ones the first is taken.
        num_gpu_experts: of all layers together; more than L * E means all of them, less than 1 none.

    Raises ArgumentError for frequencies of another number of dimensions.
    """
    if activation_freq.dim() != 2:
        raise ArgumentError(f"activation_freq: expected [layers, experts], found shape {list(activation_freq.shape)}")
    order = activation_freq.detach().cpu().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(order.numel(), dtype=torch.bool, device="cpu")
    mask[order[: max(0, num_gpu_experts)]] = True
    return mask.view(activation_freq.shape)
