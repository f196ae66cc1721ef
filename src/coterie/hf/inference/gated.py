"""Gated MLPs of packed layers, dense ones and shared experts, of tokens that are decoded: gate, up and down as one call
of the engine, as it computes an expert.

They are found by their structure and proved by trying them when they decode their first token: what the module answers
to rows of our own is what the engine must answer, with one of its activations."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from coterie import _native
from coterie.activations import KINDS, Activation
from coterie.border import runs_now
from coterie.hf.dense import PackedLinear
from coterie.hf.inference.proving import FEW, TOLERANCE, is_silent
from coterie.hf.mixed import mixed

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Of the rows that are tried: where an activation's input is about 1, it tells kinds apart, where it is large, limits.
SCALES = tuple(2.0**n for n in range(-3, 7))


def join_gates(model: nn.Module) -> None:
    """Has the gated MLPs of a model become such."""
    for module in list(model.modules()):
        parts = dict(module.named_children())
        others = [part for name, part in parts.items() if name not in PROJECTIONS]
        plain = not any(True for part in others for _ in part.parameters()) and not module._parameters
        if plain and all(isinstance(parts.get(name), PackedLinear) for name in PROJECTIONS):
            module.__class__ = mixed(QuickGated, type(module))


class QuickGated(nn.Module):
    """Mixed into the class of a gated MLP. quick_kind: the activation that the engine computes, as it takes it; None:
    not tried yet, or tried with those parts and found to be something else."""

    quick_kind: tuple[int, float, float, float] | None = None
    kind_parts: tuple[nn.Module, ...] | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [B, T, H] or [T, H] -> the same shape."""
        if not args and not kwargs and self._decodes(x):
            if self.kind_parts is None or not self._stands():
                self.kind_parts = tuple(self.children())
                self.quick_kind = None
                self.quick_kind = self._found(x)
            out = self._computed(x)
            if out is not None:
                return out
        return super().forward(x, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("quick_kind", "kind_parts")}

    def _stands(self) -> bool:
        """Whether its parts are those that were tried: another activation is another kind."""
        return self.kind_parts == tuple(self._modules.values())

    def _decodes(self, x: Any) -> bool:
        if self.quick_kind is None and self.kind_parts is not None and self._stands():
            return False
        if type(x) is not Tensor or self.training or torch.is_grad_enabled() or not runs_now() or x.is_neg():
            return False
        if has_global_hooks():
            return False
        decoded = x.dim() == 2 or (x.dim() == 3 and x.shape[1] == 1)
        return x.dtype in TOLERANCE and decoded and x.shape[:-1].numel() <= FEW

    def at_once(self, kind: tuple[int, float, float, float] | None = None) -> tuple[Any, ...] | None:
        """What the engine is to be given: three weights, the activation that was found or `kind`, and whether it rounds
        to int8. None where a part is no longer what it was, somebody listens to it, or they do not compute alike."""
        parts, kind = [self._modules[name] for name in PROJECTIONS], kind or self.quick_kind
        if kind is None or not self._stands():
            return None
        if not all(type(part).forward is PackedLinear.forward and is_silent(part) for part in parts):
            return None
        weights = [part.packed.linear.weight for part in parts]  # type: ignore[union-attr]
        integer = {weight.uses_int8() for weight in weights}
        return (*weights, kind, integer.pop()) if len(integer) == 1 else None

    def _computed(self, x: Tensor, kind: tuple[int, float, float, float] | None = None) -> Tensor | None:
        given = self.at_once(kind)
        return None if given is None else _native.gated(*given[:3], x, *given[3:])

    def _found(self, x: Tensor) -> tuple[int, float, float, float] | None:
        """The activation with which the engine answers as the module does."""
        random = torch.randn(len(SCALES), x.shape[-1], generator=torch.Generator().manual_seed(0))
        rows = (random * torch.tensor(SCALES)[:, None]).to(x.dtype)
        rows = rows[:, None] if x.dim() == 3 else rows
        try:
            expected = super().forward(rows)
        except Exception:
            return None
        kinds = [Activation(name).native() for name in KINDS]
        errors = {kind: _error(self._computed(rows, kind), expected) for kind in kinds}
        best = min(errors, key=errors.__getitem__)
        return best if errors[best] <= TOLERANCE[x.dtype] else None


def _error(found: Tensor | None, expected: Any) -> float:
    """The largest of a row, to the row's largest value: small rows would drown in large ones."""
    if found is None or not isinstance(expected, Tensor):
        return math.inf
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return math.inf
    difference, size = (found.float() - expected.float()).abs().amax(-1), expected.float().abs().amax(-1)
    return float((difference / size.clamp(min=1e-30)).max())
