"""What is done with rows of slots beside products: by Triton's kernels where they run, else by torch's operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie.activations import Activation
from coterie.gpu import fast
from coterie.gpu.activate import activate


def activated(activation: Activation, before: Tensor, weights: Tensor, has_gate: bool, more: int) -> Tensor:
    """bfloat16 [rows, I + more]: the activation of what stands before it, times routing weights; more columns are not
    set.

    before: bfloat16 [rows, 2 I], gate and up side by side, or [rows, I] without a gate; weights: float32 [rows].
    """
    if fast.usable(before.device):
        from coterie.gpu.kernels import rows as kernels

        return kernels.activate(activation, before, weights, has_gate, more)
    return F.pad(_weighted(_hidden(activation, before, has_gate), weights), (0, more))


def slope(
    activation: Activation, before: Tensor, back: Tensor, weights: Tensor, has_gate: bool, more: int, wanted: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `before`, bfloat16 [rows, 2 I + more], and of `weights`, float32; more columns are not set.

    And, where it is wanted, `activated` without more columns.

    back: bfloat16 [rows, I], the gradient of `activated`.
    """
    if fast.usable(before.device):
        from coterie.gpu.kernels import rows as kernels

        return kernels.slope(activation, before, back, weights, has_gate, more, wanted)
    with torch.enable_grad():
        leaf = before.detach().requires_grad_()
        hidden = _hidden(activation, leaf, has_gate)
    (grad,) = torch.autograd.grad(hidden, leaf, _weighted(back, weights))
    hidden = hidden.detach()
    own = (back * hidden).sum(1, dtype=torch.float32)
    return F.pad(grad, (0, more)), own, _weighted(hidden, weights) if wanted else None


def combined(rows: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
    """[T, cols]: the sum, in float32 and in the order of k, of the rows place[t, k]."""
    if fast.usable(rows.device):
        from coterie.gpu.kernels import rows as kernels

        return kernels.combine(rows, place, dtype)
    slots = rows.index_select(0, place.flatten())
    return slots.view(*place.shape, rows.shape[1]).sum(1, dtype=torch.float32).to(dtype)


def _hidden(activation: Activation, before: Tensor, has_gate: bool) -> Tensor:
    gate, up = before.chunk(2, 1) if has_gate else (None, before)
    return activate(activation, gate, up)


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    return (rows * weights[:, None]).to(torch.bfloat16)
