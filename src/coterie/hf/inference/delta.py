"""Linear attention by the gated delta rule (Qwen3-Next, Qwen3.5) by the engine: convolution, rule, norm and gate as one
call between the module's own projections, in the place of torch's sixty.

Modules are found by their structure and proved by trying them at their first call, with a copy of its states and rows
of our own: what the module answers, and leaves behind, is what the engine must."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from coterie import _native
from coterie.border import runs_now
from coterie.hf.inference.proving import TOLERANCE, is_silent, same
from coterie.hf.mixed import mixed

BY_HEAD, BY_KIND = ("in_proj_qkvz", "in_proj_ba"), ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
PARTS = {"conv1d", "norm", "out_proj"}
CACHES = ("cache", "cache_params")  # its names in a module's forward, since Transformers 5.24 and before
MASK = "attention_mask"  # [B, T], 0: padding; None: there is none
# What else a module may be called with: of it, this says nothing.
KNOWN = {*CACHES, MASK, "use_cache", "output_router_logits", "position_ids", "cache_position"}
STATES = ("conv_states", "recurrent_states", "has_previous_state")  # of a layer of a cache, by number
TRIED = 6, 1  # tokens that a module is proved by: a prompt, and one that is decoded


def attend_linearly(model: nn.Module) -> None:
    """Has the modules of linear attention in a model become such."""
    for module in list(model.modules()):
        if _projections(module) is not None:
            module.__class__ = mixed(QuickDelta, type(module))


def _projections(module: nn.Module) -> tuple[str, ...] | None:
    """The names of a module's projections, if it is built as such."""
    names = {name for name, _ in module.named_children()}
    found = next((way for way in (BY_HEAD, BY_KIND) if names == {*way, *PARTS}), None)
    own = all(hasattr(module, name) for name in ("A_log", "dt_bias", "num_k_heads", "head_k_dim", "layer_idx"))
    return found if own and isinstance(module.conv1d, nn.Conv1d) else None


class QuickDelta(nn.Module):
    """Mixed into the class of a module of linear attention. is_quick: whether the engine computes what it does, with
    those parts and of rows of that dtype; None: not tried yet."""

    is_quick: bool | None = None
    proved_parts: tuple[nn.Module, nn.Module, torch.dtype] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [B, T, H] and what else the module's own forward takes -> [B, T, H]."""
        layer = None if args else self._asked(hidden_states, kwargs)
        if layer is not None:
            parts = self.conv1d, self.norm, hidden_states.dtype
            if self.is_quick is None or self.proved_parts != parts:
                self.is_quick, self.proved_parts = self._proved(hidden_states, kwargs), parts
            out = self._attend(hidden_states, kwargs.get(MASK), layer) if self.is_quick else None
            if out is not None:
                return self.out_proj(out)
        return super().forward(hidden_states, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("is_quick", "proved_parts")}

    def _asked(self, x: Tensor, kwargs: dict[str, Any]) -> Any:
        """This module's part of the cache of a call that the engine may answer; None for other calls."""
        if self.training or torch.is_grad_enabled() or not runs_now():
            return None
        if type(x) is not Tensor or x.dim() != 3 or not x.numel() or not x.is_cpu:
            return None
        tried = self.proved_parts == (self.conv1d, self.norm, x.dtype)
        if self.is_quick is False and (tried or self.proved_parts is None):
            return None
        if any(value is not None and value is not False for name, value in kwargs.items() if name not in KNOWN):
            return None
        mask = kwargs.get(MASK)
        if mask is not None and (type(mask) is not Tensor or mask.shape != x.shape[:2]):
            return None
        heard = (self.conv1d, self.norm) if tried else self.children()  # projections are called, when tried in vain too
        if has_global_hooks() or not all(map(is_silent, heard)):
            return None
        return remembered(next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None), self)

    def projections(self) -> list[nn.Module]:
        """Those before the rule, and the one behind it."""
        names = BY_HEAD if hasattr(self, BY_HEAD[0]) else BY_KIND
        return [self._modules[name] for name in (*names, "out_proj")]

    def is_proved(self) -> bool:
        """Whether the engine computes what this module does, with the parts that it has."""
        own = self._modules["conv1d"], self._modules["norm"]
        return bool(self.is_quick) and self.proved_parts is not None and self.proved_parts[:2] == own

    def own_parts(self, layer: Any) -> tuple[Any, ...]:
        """What the engine takes beside the projections; `layer`: this module's part of a cache, which it writes to."""
        convolution, norm, own = self._modules["conv1d"], self._modules["norm"], self._parameters
        return (
            layer.conv_states[0], convolution.weight, convolution.bias, layer.recurrent_states[0], own["A_log"],
            own["dt_bias"], norm.weight, norm.variance_epsilon, self.num_k_heads,
        )  # fmt: skip

    def _attend(self, x: Tensor, mask: Tensor | None, layer: Any) -> Tensor | None:
        """What goes into the last projection; the cache's states are those behind x then. None: they are as before, or
        zeros where there were none."""
        if mask is not None:
            x = (x * mask[..., None]).to(x.dtype)
        made = [projection(x) for projection in self.projections()[:-1]]
        mixed_rows, gates, betas, steps = made if len(made) == len(BY_KIND) else (made[0], None, made[1], None)
        if not layer.has_previous_state[0]:
            weight = self.conv1d.weight
            layer.update_conv_state(made[0].new_zeros(len(x), len(weight), weight.shape[-1]))
            state = len(x), len(self.A_log), self.head_k_dim, len(self.norm.weight)
            layer.update_recurrent_state(made[0].new_zeros(state, dtype=torch.float32))
        return _native.delta_rule(mixed_rows, gates, betas, steps, self.own_parts(layer))

    def _proved(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the engine answers as the module does, and leaves the same states."""
        if x.dtype not in TOLERANCE:
            return False
        random = torch.randn(len(x), sum(TRIED), x.shape[-1], generator=torch.Generator().manual_seed(0)).to(x.dtype)
        name = next(name for name in CACHES if kwargs.get(name) is not None)
        mine, theirs = (alone(kwargs[name], self.layer_idx) for _ in range(2))
        layer, other = remembered(mine, self), remembered(theirs, self)
        padding = torch.ones(len(x), TRIED[0], dtype=torch.int64)
        padding[0, 0] = 0
        try:
            for rows, mask in zip(random.split(TRIED, dim=1), (padding, None), strict=True):
                expected = super().forward(rows, **{**kwargs, name: theirs, MASK: mask})
                found = self._attend(rows, mask, layer)
                if found is None or not same(self.out_proj(found), expected):
                    return False
                if not all(same(getattr(layer, kind)[0], getattr(other, kind)[0]) for kind in STATES[:2]):
                    return False
        except Exception:
            return False
        return True


def remembered(cache: Any, module: Any) -> Any:
    """A module's part of a cache, if it is one as the engine knows them, of which nothing is to be taken back."""
    layers = getattr(cache, "layers", ())
    found = layers[module.layer_idx] if module.layer_idx < len(layers) else None
    if not all(isinstance(getattr(found, name, None), dict) for name in STATES) or getattr(found, "record_past", False):
        return None
    return found


def alone(cache: Any, index: int) -> Any:
    """A cache whose layer of that number is a copy."""
    found = copy.copy(cache)
    found.layers = list(cache.layers)
    found.layers[index] = copy.deepcopy(cache.layers[index])
    return found
