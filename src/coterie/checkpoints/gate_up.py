"""Gate and up in one tensor: one after the other, or row by row in turn."""

from __future__ import annotations

import torch
from torch import Tensor


def split_gate_up(both: Tensor, dim: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Views of gate and up, each with half the rows that `both` has in dimension `dim`."""
    if interleaved:
        gate, up = both.unflatten(dim, (-1, 2)).unbind(dim + 1)
    else:
        gate, up = both.chunk(2, dim)
    return gate, up


def join_gate_up(gate: Tensor, up: Tensor, dim: int, interleaved: bool) -> Tensor:
    """The inverse of `split_gate_up`."""
    return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1) if interleaved else torch.cat((gate, up), dim)
