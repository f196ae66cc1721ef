"""Linear attention by the gated delta rule (Qwen3-Next, Qwen3.5) of a token that is decoded, by the engine:
convolution, rule, norm and gate as one call between the module's own projections, in the place of torch's sixty.

Modules are found by their structure and proved by trying them when they decode their first token, with its states and a
row of our own: what the module answers, and leaves behind, is what the engine must."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from coterie import _native
from coterie.border import runs_now
from coterie.hf.inference.proving import TOLERANCE, is_silent, same
from coterie.hf.inference.quick import FEW
from coterie.hf.mixed import mixed

BY_HEAD, BY_KIND = ("in_proj_qkvz", "in_proj_ba"), ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
PARTS = {"conv1d", "norm", "out_proj"}
CACHES = ("cache", "cache_params")  # its names in a module's forward, since Transformers 5.24 and before
# What else a module may be called with: of it, this says nothing.
KNOWN = {*CACHES, "use_cache", "output_router_logits", "position_ids", "cache_position"}
STATES = ("conv_states", "recurrent_states", "has_previous_state")  # of a layer of a cache, by number


def attend_linearly(model: nn.Module) -> None:
    """Has the modules of linear attention in a model become such."""
    for module in list(model.modules()):
        if _projections(module) is not None:
            module.__class__ = mixed(QuickDelta, type(module))


def _projections(module: nn.Module) -> tuple[str, ...] | None:
    """The names of a module's projections, if it is built as such."""
    names = {name for name, _ in module.named_children()}
    found = next((way for way in (BY_HEAD, BY_KIND) if names == {*way, *PARTS}), None)
    own = all(hasattr(module, name) for name in ("A_log", "dt_bias", "num_k_heads", "layer_idx"))
    return found if own and isinstance(module.conv1d, nn.Conv1d) else None


class QuickDelta(nn.Module):
    """Mixed into the class of a module of linear attention. is_quick: whether the engine computes what it does, with
    those parts; None: not tried yet."""

    is_quick: bool | None = None
    proved_parts: tuple[nn.Module, nn.Module] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [B, T, H] and what else the module's own forward takes -> [B, T, H]."""
        states = None if args else self._states(hidden_states, kwargs)
        if states is not None:
            parts = self.conv1d, self.norm
            if self.is_quick is None or parts != self.proved_parts:
                self.is_quick, self.proved_parts = self._proved(hidden_states, kwargs), parts
            out = self._step(hidden_states, *states) if self.is_quick else None
            if out is not None:
                return self.out_proj(out)
        return super().forward(hidden_states, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("is_quick", "proved_parts")}

    def _states(self, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        """The window of the convolution and the state of a token that is decoded; None for other calls."""
        if self.is_quick is False or self.training or torch.is_grad_enabled() or not runs_now():
            return None
        if type(x) is not Tensor or x.dim() != 3 or x.shape[1] != 1 or len(x) > FEW or not x.is_cpu:
            return None
        if any(value is not None and value is not False for name, value in kwargs.items() if name not in KNOWN):
            return None
        if has_global_hooks() or not all(map(is_silent, (self.conv1d, self.norm))):
            return None
        layer = self._layer(next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None))
        if layer is None or getattr(layer, "record_past", False) or not layer.has_previous_state[0]:
            return None
        return layer.conv_states[0], layer.recurrent_states[0]

    def _layer(self, cache: Any) -> Any:
        """This module's part of a cache, if it is one as the engine knows them."""
        layers = getattr(cache, "layers", ())
        found = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        return found if all(isinstance(getattr(found, name, None), dict) for name in STATES) else None

    def _step(self, x: Tensor, window: Tensor, state: Tensor) -> Tensor | None:
        """What goes into the last projection; both states are those behind the token then. None: nothing was done."""
        names = BY_HEAD if hasattr(self, BY_HEAD[0]) else BY_KIND
        made = [getattr(self, name)(x) for name in names]
        mixed_row, gates, betas, steps = made if names is BY_KIND else (made[0], None, made[1], None)
        convolution, norm = self.conv1d, self.norm
        return _native.delta_step(
            mixed_row, gates, betas, steps, window, convolution.weight, convolution.bias, state, self.A_log,
            self.dt_bias, norm.weight, norm.variance_epsilon, self.num_k_heads,
        )  # fmt: skip

    def _proved(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the engine answers as the module does, and leaves the same states."""
        if x.dtype not in TOLERANCE:
            return False
        random = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)
        name = next(name for name in CACHES if kwargs.get(name) is not None)
        mine, theirs = (_alone(kwargs[name], self.layer_idx) for _ in range(2))
        try:
            expected = super().forward(random, **{**kwargs, name: theirs})
            layer = self._layer(mine)
            found = self._step(random, layer.conv_states[0], layer.recurrent_states[0])
        except Exception:
            return False
        other = self._layer(theirs)
        if found is None or not same(self.out_proj(found), expected):
            return False
        return all(same(getattr(layer, kind)[0], getattr(other, kind)[0]) for kind in STATES[:2])


def _alone(cache: Any, index: int) -> Any:
    """A cache whose layer of that number is a copy."""
    found = copy.copy(cache)
    found.layers = list(cache.layers)
    found.layers[index] = copy.deepcopy(cache.layers[index])
    return found
