"""The function between an expert's matrices, in the dtype that is given."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.activations import Activation


def activate(activation: Activation, gate: Tensor | None, up: Tensor) -> Tensor:
    """As `Activation` says. Differentiable, by torch."""
    x = up if gate is None else gate
    if activation.limit > 0 and gate is not None:
        x, up = x.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    if activation.kind == "silu":
        x = F.silu(x) if activation.alpha == 1 else x * torch.sigmoid(activation.alpha * x)
    elif activation.kind in ("gelu", "gelu_tanh"):
        x = F.gelu(x, approximate="tanh" if activation.kind == "gelu_tanh" else "none")
    else:
        x = F.relu(x) if activation.kind == "relu" else F.relu(x).square()
    if gate is None:
        return x
    return x * (up + activation.up_offset if activation.up_offset else up)
