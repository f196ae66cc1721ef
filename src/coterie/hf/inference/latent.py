"""Attention to latents (DeepSeek-V2, arXiv:2405.04434) of decoded tokens. Transformers caches latents, and makes the
keys and values of all positions of them for each token; here the query meets the latents themselves.

A module's keys and values are made when something asks for them: prompts, other attention. Modules are found by their
structure and proved by trying them: what they make of random latents is what their matrix makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks
from torch.utils import _pytree as pytree

from coterie import _native
from coterie.border import runs_now
from coterie.hf.dense import PackedLinear
from coterie.hf.inference.plain import QuickLinear
from coterie.hf.inference.proving import FEW, TOLERANCE, is_silent, same
from coterie.hf.mixed import mixed

EXPANSION = "kv_b_proj"  # latents to keys and values, of each head first the one, then the other
ATTRIBUTES = "expand_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank", "num_heads"
KINDS = "keys", "values"
BLOCK = 64  # rows of a packed matrix
PER_TOKEN = 8  # positions to a token, from which on few tokens, that are verified or read anew, go to latents too
LANES = 16  # columns of a latent, and of what is cached beside it, are a multiple of


def attend_to_latents(model: nn.Module) -> None:
    """Has the attention modules of a model that cache latents become such."""
    for module in _caching_latents(model):
        if isinstance(module._modules.get(EXPANSION), nn.Linear):
            module.__class__ = mixed(QuickLatent, type(module))


def operations(model: nn.Module, positions: int) -> int:
    """Those, two a multiply-add, in which a token's queries meet so many cached latents, in all layers of a model."""
    widths = [m.num_heads * (2 * m.kv_lora_rank + m.qk_rope_head_dim) for m in _caching_latents(model)]
    return 2 * positions * sum(widths)


def _caching_latents(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if all(hasattr(module, name) for name in ATTRIBUTES)]


class QuickLatent(nn.Module):
    """Mixed into the class of an attention module that caches latents.

    latent_proved: the layer that makes keys and values of them, its class, its packed matrix, and the dtype that it was
    tried with; latent_weight: None where the layer does something else; a packed one's as the engine reads it.
    """

    latent_proved: tuple[Any, ...] | None = None
    latent_weight: Any = None

    def expand_kv(self, latents: Tensor, turned: Tensor) -> Any:
        """[B, 1, S, R] and [B, 1, S, D] -> keys and values [B, heads, S, K + D] and [B, heads, S, V]."""
        matrix = self.expansion_of(latents.dtype) if _is_taken(self, latents, turned) else None
        if matrix is None:
            return super().expand_kv(latents, turned)
        expansion = Expansion(super().expand_kv, matrix, latents, turned)
        heads = self._modules[EXPANSION].out_features // (self.qk_nope_head_dim + self.v_head_dim)
        widths = self.qk_nope_head_dim + turned.shape[-1], self.v_head_dim
        return tuple(Expanded(expansion, heads, width, kind) for width, kind in zip(widths, KINDS, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("latent_proved", "latent_weight")}

    def expansion_of(self, dtype: torch.dtype) -> Any:
        """The matrix [heads (K + V), R] that makes keys and values, a tensor of that dtype, and None; or packed, where
        heads are whole blocks of it, and the rows that make keys. None where they are not made by that alone."""
        layer = self._modules[EXPANSION]
        own, packed = layer._parameters, layer.__dict__.get("packed")
        if not is_silent(layer) or own.get("weight") is None or own.get("bias") is not None:
            return None
        tried = layer, type(layer), packed, dtype
        if self.latent_proved is None or any(a is not b for a, b in zip(self.latent_proved, tried, strict=True)):
            self.latent_proved, self.latent_weight = tried, self._proved(dtype)
        return self.latent_weight if packed is not None or self.latent_weight is None else (own["weight"], None)

    def _proved(self, dtype: torch.dtype) -> Any:
        layer = self._modules[EXPANSION]
        if not isinstance(layer, PackedLinear | QuickLinear) and type(layer) is not nn.Linear:
            return None
        packed = isinstance(layer, PackedLinear)
        weight = layer.packed.dense("weight", dtype) if packed else layer.weight
        key_dim, value_dim = self.qk_nope_head_dim, self.v_head_dim
        if weight.dtype != dtype or dtype not in TOLERANCE:
            return None
        if not weight.is_contiguous() or len(weight) % (key_dim + value_dim):
            return None
        random = torch.Generator().manual_seed(0)
        latents = torch.randn(1, 1, 3, weight.shape[1], generator=random).to(dtype)
        turned = torch.randn(1, 1, 3, self.qk_rope_head_dim, generator=random).to(dtype)
        by_head = latents @ weight.unflatten(0, (-1, key_dim + value_dim)).transpose(1, 2)
        keys, values = by_head.split([key_dim, value_dim], dim=-1)
        expected = torch.cat([keys, turned.expand(-1, keys.shape[1], -1, -1)], dim=-1), values
        try:
            found = super().expand_kv(latents, turned)
        except Exception:
            return None
        if not all(same(e, f) for e, f in zip(expected, found, strict=True)):
            return None
        if not packed:
            return ()
        if key_dim % BLOCK or value_dim % BLOCK:
            return weight, None
        of_keys = weight.unflatten(0, (-1, key_dim + value_dim))[:, :key_dim]
        return layer.packed.linear.weight, of_keys.flatten(0, 1)


def _is_taken(module: nn.Module, latents: Any, turned: Any) -> bool:
    """Whether the attention that follows may be the engine's."""
    if module.training or torch.is_grad_enabled() or not runs_now() or has_global_hooks():
        return False
    if type(latents) is not Tensor or type(turned) is not Tensor or not latents.is_cpu or latents.dim() != 4:
        return False
    return latents.shape[-1] % LANES == 0 and turned.shape[-1] % LANES == 0 and latents.dtype == turned.dtype


def rounds(matrix: tuple[Any, Tensor | None]) -> bool:
    """Whether weighted sums are rounded to int8, to be multiplied with a matrix."""
    return matrix[1] is not None and matrix[0].uses_int8()


class Expansion:
    """Latents and what is cached beside them, and the keys and values that are made of both once something asks."""

    def __init__(self, expand: Callable, matrix: Any, latents: Tensor, turned: Tensor) -> None:
        self.matrix, self.latents, self.turned = matrix, latents, turned
        self._expand, self._made = expand, None

    def made(self) -> dict[str, Tensor]:
        """Both, by name."""
        if self._made is None:
            self._made = dict(zip(KINDS, self._expand(self.latents, self.turned), strict=True))
        return self._made

    def attend(self, query: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None) -> Tensor | None:
        """query [B, heads, T, K + D] -> [B, T, heads, V], a token at a time; None where making keys and values costs
        less, and for what the engine does not take: tokens of which no mask says what they see."""
        tokens, positions = query.shape[2], self.latents.shape[2]
        if tokens > 1 and (tokens > FEW or positions < PER_TOKEN * tokens or mask is None):
            return None
        flags, found = (scale, sinks, rounds(self.matrix)), []
        for token in range(tokens):
            one, seen = query[:, :, token : token + 1], None if mask is None else mask[:, :, token : token + 1]
            found.append(_native.attend_latents(one, self.matrix, self.latents, self.turned, seen, *flags))
        return None if any(out is None for out in found) else found[0] if tokens == 1 else torch.cat(found, dim=1)


class Expanded(Tensor):
    """The keys or values of an expansion: shape, dtype and device are there before they are. Torch's attention of few
    tokens, which models choose whose mask says what an indexer chose, goes to the latents too."""

    expansion: Expansion
    kind: str

    @staticmethod
    def __new__(cls, expansion: Expansion, heads: int, width: int, kind: str) -> Expanded:
        like = expansion.latents
        shape = len(like), heads, like.shape[-2], width
        found = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        found.expansion, found.kind = expansion, kind
        return found

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = _attended(*args, **(kwargs or {})) if function is functional.scaled_dot_product_attention else None
            return function(*args, **(kwargs or {})) if out is None else out

    @classmethod
    def __torch_dispatch__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map_only(cls, made, (args, kwargs or {}))
        return function(*args, **kwargs)


def _attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """What torch's attention gives, by latents; None for what does not go to them."""
    if not are_of_one(key, value) or dropout_p or is_causal:
        return None
    out = key.expansion.attend(query, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale, None)
    return None if out is None else out.transpose(1, 2)


def are_of_one(key: Tensor, value: Tensor) -> bool:
    """Whether keys and values are those of one expansion."""
    return type(key) is Expanded and type(value) is Expanded and key.expansion is value.expansion


def made(states: Tensor) -> Tensor:
    """Keys or values as an ordinary tensor."""
    return states.expansion.made()[states.kind] if type(states) is Expanded else states
