"""What an experts module's gate computes, found by trying it.

Modules name their activation, clamp and offset differently (`act_fn`, `alpha`, `swiglu_limit` ...), and the gate itself
is code. So the gate is evaluated at a few points, the parameters of `Activation` are solved from the values, and the
result is compared with the module on a grid: what agrees everywhere is what the kernels compute, whatever the names.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coterie.activations import Activation

GRID = torch.linspace(-12.0, 12.0, 97, dtype=torch.float64, device="cpu")
EDGE = torch.tensor([-2.0, -1.1, -0.9, 0.9, 1.1, 2.0], dtype=torch.float64, device="cpu")
FAR = 1e4
TOLERANCE = 1e-5

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def probe(module: nn.Module, has_gate: bool, is_concatenated: bool) -> Activation | None:
    """What `module` applies between its projections, or None if it is nothing that the kernels compute.

    The module itself may be on the meta device, and that may be the default device.
    """
    with torch.no_grad(), torch.device("cpu"):
        try:
            if has_gate:
                return _solve(lambda gate, up: _try_gate(module, gate, up, is_concatenated))
            return _kind(lambda x: module.act_fn(x).to(GRID.dtype))
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, ZeroDivisionError):
            return None


def _try_gate(module: nn.Module, gate: Tensor | float, up: Tensor | float, is_concatenated: bool) -> Tensor:
    gate, up = torch.broadcast_tensors(torch.as_tensor(gate, dtype=GRID.dtype), torch.as_tensor(up, dtype=GRID.dtype))
    pairs = torch.stack([gate, gate, up, up] if is_concatenated else [gate, up, gate, up], dim=-1)
    return module._apply_gate(pairs)[..., 0].to(GRID.dtype)


def _solve(gate: Callable[..., Tensor]) -> Activation | None:
    at_zero, at_one = gate(1.0, 0.0).item(), gate(1.0, 1.0).item()
    slope = at_one - at_zero
    offset = round(at_zero / slope, 6)
    far = gate(1.0, FAR).item() / slope - offset
    limit = round(far, 5) if far < FAR / 2 else 0.0
    # Where up + offset is one, the gate is the activation alone.
    found = _kind(lambda x: gate(x, 1.0 - offset), limit)
    if found is None:
        return None
    activation = Activation(found.kind, found.alpha, limit, offset)
    grid = torch.cat([GRID, limit * EDGE]) if limit else GRID
    g, up = grid[:, None], grid[None, :]
    values = gate(g, up)
    if limit:
        g, up = g.clamp(max=limit), up.clamp(-limit, limit)
    return activation if _close(values, _activate(activation, g) * (up + offset)) else None


def _kind(function: Callable[[Tensor], Tensor], limit: float = 0.0) -> Activation | None:
    """The one-argument activation that `function` is, below `limit` where that is not 0."""
    values = function(GRID)
    slope = function(torch.ones_like(GRID[:1])).item()
    x = GRID.clamp(max=limit) if limit else GRID
    candidates = [Activation(kind) for kind in KINDS]
    if 0.0 < slope < 1.0:
        candidates.append(Activation("silu", alpha=round(torch.logit(torch.tensor(slope, dtype=GRID.dtype)).item(), 6)))
    return next((c for c in candidates if _close(values, _activate(c, x))), None)


def _activate(activation: Activation, x: Tensor) -> Tensor:
    if activation.kind == "silu":
        return x * torch.sigmoid(activation.alpha * x)
    return KINDS[activation.kind](x)


def _close(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
