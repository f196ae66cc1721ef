"""The experts in plain torch, float32: the truth that every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import Activation
from .lora import ExpertLora

_Factors = tuple[Tensor | None, Tensor | None, float]


def act(activation: Activation, gate: Tensor | None, up: Tensor) -> Tensor:
    """``act(gate) * (up + up_offset)``, or ``act(up)`` where ``gate`` is None."""
    x = up if gate is None else gate
    if activation.limit > 0 and gate is not None:
        x = x.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
    kinds = {
        "silu": lambda v: v * torch.sigmoid(activation.alpha * v),
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda v: F.relu(v) ** 2,
    }
    y = kinds[activation.kind](x)
    return y if gate is None else y * (up + activation.up_offset)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora: _Factors, expert: int) -> Tensor:
    y = F.linear(x, weight[expert].float(), None if bias is None else bias[expert].float())
    a, b, scaling = lora
    if a is None or b is None:
        return y
    return y + scaling * (x @ a[expert].float().T) @ b[expert].float().T


def forward(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Activation = Activation(),  # noqa: B008
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    lora: ExpertLora | None = None,
) -> Tensor:
    """``out[t] = sum_k weights[t,k] * down_e(act(gate_e x[t], up_e x[t]))``, ``e = ids[t,k]``; -1 adds nothing.

    With LoRA each projection is ``W x + scaling * B (A x)``. Differentiable, by torch.

    x [T,H], ids [T,K], weights [T,K], gate and up [E,I,H], down [E,H,I], biases [E,I] and [E,H] -> float32 [T,H].
    """
    x, weights = x.float(), weights.float()
    lora = lora or ExpertLora()
    gate_lora, up_lora, down_lora = ((*p, s) for p, s in zip(lora.pairs().values(), lora.scalings(), strict=True))
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        if e < 0:
            continue
        t, k = (ids == e).nonzero(as_tuple=True)
        g = None if gate is None else _linear(x[t], gate, gate_bias, gate_lora, e)
        u = _linear(x[t], up, up_bias, up_lora, e)
        y = _linear(act(activation, g, u), down, down_bias, down_lora, e)
        out = out.index_add(0, t, y * weights[t, k, None])
    return out


def quantise(w: Tensor, bits: int, group_size: int = 0, zero_point: bool = False) -> Tensor:
    """``w`` [N,K] rounded to the packed formats' grid without scale search, as float32 values.

    int8: ``max|w| / 127`` per row or group. int4: the extreme value maps to code -8; with a zero point, the range
    (widened to hold 0) to 0..15.
    Grouped scales are rounded to bf16.
    """
    n, k = w.shape
    group = group_size or k
    g = w.float().view(n, k // group, group)
    if bits == 8:
        scale, zero, low, high = g.abs().amax(-1, keepdim=True) / 127, g.new_full((n, k // group, 1), 128.0), 1, 255
    elif zero_point:
        least, most = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
        scale, low, high = (most - least) / 15, 0, 15
        zero = torch.where(scale > 0, (-least / scale.clamp(min=1e-38)).round().clamp(0, 15), torch.full_like(scale, 8))
    else:
        extreme = g.gather(-1, g.abs().argmax(-1, keepdim=True))
        scale, zero, low, high = extreme / -8, g.new_full((n, k // group, 1), 8.0), 0, 15
    if group_size:
        scale = scale.bfloat16().float()
    inverse = torch.where(scale != 0, 1 / scale, torch.zeros_like(scale))
    code = (g * inverse + zero).round().clamp(low, high)
    return ((code - zero) * scale).view(n, k)
