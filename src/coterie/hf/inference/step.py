"""A decoded token's way through a layer of a model as two calls of the engine: attention with its norms, projections,
rotary embeddings and cache; and the norm, router and experts that follow.

Layers are found by their structure and proved by trying them when they decode their first token, with that token's
positions and cache and with rows of our own: what the layer answers is what the engine must answer. Where only
attention can be had so, the layer's own modules do the rest; any other layer goes on as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from coterie import _native
from coterie.border import runs_now
from coterie.hf.dense import PackedLinear
from coterie.hf.inference.attention import NAME, NAME_EAGER
from coterie.hf.inference.growing import ARGUMENTS, Growing
from coterie.hf.inference.proving import TOLERANCE, is_silent, same
from coterie.hf.inference.quick import FEW, QuickNorm, QuickRouter
from coterie.hf.mixed import mixed
from coterie.hf.modules import packed_module

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
SINKS = "sinks"
Angles = tuple[Tensor, Tensor]
POSITIONS, MASK = "position_embeddings", "attention_mask"
IMPLEMENTATION = "_attn_implementation_internal"
# What a layer may be called with beside its rows; position_ids say nothing where there are embeddings of positions.
KNOWN = {POSITIONS, MASK, *ARGUMENTS, "position_ids", "use_cache", "cache_position"}
LARGE = 64.0


def step_at_once(model: nn.Module) -> None:
    """Has the layers of a model become such wherever they can be; norms and routers are quickened before."""
    for module in list(model.modules()):
        if LayerParts.find(module) is not None:
            module.__class__ = mixed(QuickLayer, type(module))


class QuickLayer(nn.Module):
    """Mixed into the class of a layer.

    quick_step: what computes its tokens; None: not tried yet, or tried and found to be something else.
    """

    quick_step: LayerStep | None = None
    step_tried = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """x [B, T, H] and what else the layer's own forward takes, by name -> [B, T, H]."""
        out = _step(self, args[0], kwargs) if len(args) == 1 else None
        return super().__call__(*args, **kwargs) if out is None else out

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("quick_step", "step_tried")}


def _step(layer: QuickLayer, x: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """What the engine makes of a call, which it appends to the cache; None for calls that it does not take."""
    step = layer.quick_step
    if (step is None and layer.step_tried) or layer.training or torch.is_grad_enabled() or not runs_now():
        return None
    if type(x) is not Tensor or x.dim() != 3 or x.shape[1] != 1 or len(x) > FEW or x.is_neg():
        return None
    if any(value is not None and value is not False for name, value in kwargs.items() if name not in KNOWN):
        return None
    angles = kwargs.get(POSITIONS)
    cache = next((kwargs[name] for name in ARGUMENTS if kwargs.get(name) is not None), None)
    if type(angles) is not tuple or cache is None:
        return None
    cached = cache_layer(cache, layer)
    if cached is None or not _attends_by_engine(layer._modules["self_attn"]):
        return None
    if step is None:
        step = layer.quick_step = _proved(layer, x, kwargs, cached)
        layer.step_tried = True
    if step is None or not step.stands():
        return None
    keys, values = cached.rooms
    found = step.attend(x, angles, keys.from_start(), values.from_start(), keys.used - keys.start, kwargs.get(MASK))
    if found is None:
        return None
    cached.grown()
    return step.finish(found)


def cache_layer(cache: Any, layer: nn.Module) -> Growing | None:
    """A layer's part of a cache, if it is one that has room."""
    layers, index = getattr(cache, "layers", ()), layer._modules["self_attn"].layer_idx  # type: ignore[union-attr]
    found = layers[index] if index < len(layers) else None
    return found if isinstance(found, Growing) and found.has_room() else None


def _attends_by_engine(attention: Any) -> bool:
    # Past the configuration's own look-up, which takes longer than all else that is asked here.
    return object.__getattribute__(attention.config, IMPLEMENTATION) in (NAME, NAME_EAGER)


class LayerParts:
    """The modules of a layer that the engine may take the place of.

    router, experts: None where `block`, what follows attention, is more than these, or something else.
    """

    @classmethod
    def find(cls, layer: nn.Module) -> LayerParts | None:
        """Those of a module; None for what is not such a layer."""
        children = dict(layer.named_children())
        attention = children.get("self_attn")
        norms = [child for child in children.values() if isinstance(child, QuickNorm)]
        others = [child for child in children.values() if child is not attention and child not in norms]
        own = any(True for _ in layer.parameters(recurse=False))
        if attention is None or len(norms) != 2 or len(others) != 1 or own or not _is_attention(attention):
            return None
        return cls(layer, attention, norms, others[0])

    def __init__(self, layer: nn.Module, attention: nn.Module, norms: list[nn.Module], block: nn.Module) -> None:
        own = attention._modules
        self.attention, self.block, self.norm, self.second_norm = attention, block, *norms
        self.projections = [own[name] for name in PROJECTIONS]
        self.packed = [projection.packed for projection in self.projections]
        self.head_norms = [own[name] for name in HEAD_NORMS if name in own]
        inside = list(block.children())
        routers = [child for child in inside if isinstance(child, QuickRouter)]
        experts = [child for child in inside if packed_module(child) is not None]
        only = len(routers) == len(experts) == 1 and len(inside) == 2
        self.router, self.experts = (routers[0], experts[0]) if only else (None, None)
        owners = [layer, attention, *([block] if only else ())]
        # Where each part stands: whatever wraps or replaces one ends this.
        self.places = [(owner._modules, name, part) for owner in owners for name, part in owner._modules.items()]
        self.places.append(({"": layer}, "", layer))

    def modules(self) -> list[nn.Module]:
        """Those that a step takes the place of."""
        return [part for _, _, part in self.places if part is not self.block or self.experts is not None]

    def stand(self) -> bool:
        """Whether they are still where they were, and nobody listens to them."""
        if has_global_hooks():
            return False
        for modules, name, part in self.places:
            if modules[name] is not part or not is_silent(part):
                return False
        return all(p.__dict__.get("packed") is q for p, q in zip(self.projections, self.packed, strict=True))


def _is_attention(module: nn.Module) -> bool:
    parts = dict(module.named_children())
    norms = [parts.pop(name) for name in HEAD_NORMS if name in parts]
    projections = [parts.pop(name, None) for name in PROJECTIONS]
    if not all(isinstance(p, PackedLinear) for p in projections) or not all(isinstance(n, QuickNorm) for n in norms):
        return False
    q, k, v, o = projections
    head = getattr(module, "head_dim", 0)
    return (
        not any(True for part in parts.values() for _ in part.parameters())
        and not {name for name, _ in module.named_parameters(recurse=False)} - {SINKS}
        and len(norms) in (0, len(HEAD_NORMS))
        and isinstance(head, int)
        and head > 0
        and all(hasattr(module, name) for name in ("scaling", "layer_idx", "config"))
        and q.out_features % k.out_features == k.out_features % head == 0
        and o.in_features * k.out_features == q.out_features * v.out_features
    )


class LayerStep:
    """A layer by the engine. `halved`: embeddings of positions are of half the columns that turn."""

    def __init__(self, parts: LayerParts, halved: bool, with_experts: bool) -> None:
        self.parts, self.with_experts = parts, with_experts
        self._attention = AttentionStep(parts, halved, parts.norm)

    @property
    def attending(self) -> float:
        """Seconds that attention itself has taken in all calls, without what is before and behind it."""
        return self._attention.attending

    def stands(self) -> bool:
        """Whether the layer is still what was tried."""
        return self.parts.stand()

    def attend(self, x: Tensor, angles: Angles, keys: Tensor, values: Tensor, cached: int, mask: Any) -> Tensor | None:
        """See AttentionStep."""
        return self._attention(x, angles, keys, values, cached, mask)

    def finish(self, x: Tensor) -> Tensor:
        """What the rest of the layer makes of x [B, 1, H]."""
        out = self._experts(x) if self.with_experts else None
        return self._block(x) if out is None else out

    def _experts(self, x: Tensor) -> Tensor | None:
        parts = self.parts
        packed, router = packed_module(parts.experts), parts.router
        layer = None if packed is None else packed.experts.in_ram
        if layer is None:
            return None
        top_k, normalised, dtype = router.quick
        own = router._parameters
        return layer.step(
            x, parts.second_norm._parameters["weight"], parts.second_norm.quick, own["weight"], own.get("bias"),
            top_k, normalised, dtype == torch.bfloat16, layer.uses_int8(),
        )  # fmt: skip

    def _block(self, x: Tensor) -> Tensor:
        return x + self.parts.block(self.parts.second_norm(x))


class AttentionStep:
    """The attention of a layer by the engine, and, with the norm before it, what it is added to."""

    def __init__(self, parts: LayerParts, halved: bool, norm: Any = None) -> None:
        self._norm, self._head_norms, self._attention = norm, parts.head_norms, parts.attention
        self._weights = [p.packed.linear.weight for p in parts.projections]
        _, k, v, _ = parts.projections
        head, scale = parts.attention.head_dim, parts.attention.scaling
        options = [None if norm is None else norm.quick, *([n.quick for n in parts.head_norms] or [None, None])]
        whole = bool(parts.head_norms) and parts.head_norms[0].weight.numel() != head
        value_dim = v.out_features // (k.out_features // head)
        self._engine = _native.AttentionStep(*self._weights, *options, whole, head, value_dim, scale, halved)

    @property
    def attending(self) -> float:
        """See LayerStep."""
        return self._engine.attending

    def __call__(
        self, x: Tensor, angles: Angles, keys: Tensor, values: Tensor, cached: int, mask: Any
    ) -> Tensor | None:
        """x [B, 1, H] -> what attention makes of it; keys and values [B, heads, room, D] get position `cached`.

        None for what the engine does not take."""
        q, k, v, o = [weight.uses_int8() for weight in self._weights]
        if not q == k == v:
            return None
        norm = None if self._norm is None else self._norm._parameters["weight"]
        head_norms = [n._parameters["weight"] for n in self._head_norms] or (None, None)
        sinks = self._attention._parameters.get(SINKS)
        return self._engine(x, norm, *head_norms, *angles, keys, values, cached, mask, sinks, q, o)


def _proved(layer: QuickLayer, x: Tensor, kwargs: dict[str, Any], cached: Growing) -> LayerStep | None:
    """What computes a layer's tokens as the layer does; None where that is not found."""
    parts = LayerParts.find(layer)
    if parts is None or x.dtype not in TOLERANCE or not parts.stand():
        return None
    random = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.dtype)
    seen: list[Tensor] = []
    hook = parts.second_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        halved = _halved(parts, random, kwargs, cached)
        if halved is None:
            return None
        expected = type(layer).forward(layer, random, **_on_trial(kwargs, cached))
    except Exception:
        return None
    finally:
        hook.remove()
    if len(seen) != 1 or not same(_tried(LayerStep(parts, halved, False).attend, random, kwargs, cached), seen[0]):
        return None
    for with_experts in (False,) if parts.experts is None else (True, False):
        step = LayerStep(parts, halved, with_experts)
        if same(step.finish(seen[0]), expected):
            return step
    return None


def _halved(parts: LayerParts, random: Tensor, kwargs: dict[str, Any], cached: Growing) -> bool | None:
    """The `halved` with which the engine's attention answers as the layer's does; None for neither.

    Rows as large as the second's show whether the module limits them. All but the token itself would drown in those.
    """
    alone = random.new_full((len(random), 1, 1, cached.keys.shape[-2] + 1), torch.finfo(random.dtype).min)
    alone[..., -1] = 0
    trials = [(random, kwargs), (random * LARGE, {**kwargs, MASK: alone})]
    answers = [parts.attention(hidden_states=x, **_on_trial(given, cached)) for x, given in trials]
    for halved in (False, True):
        step = AttentionStep(parts, halved)
        found = [_tried(step, x, given, cached) for x, given in trials]
        if all(same(f, a[0]) and a[1] is None for f, a in zip(found, answers, strict=True)):
            return halved
    return None


def _on_trial(kwargs: dict[str, Any], cached: Growing) -> dict[str, Any]:
    """What a layer is called with, and a cache that stays as it is."""
    return {k: TrialCache(cached) if k in ARGUMENTS and v is not None else v for k, v in kwargs.items()}


def _tried(attend: Callable, x: Tensor, kwargs: dict[str, Any], cached: Growing) -> Tensor | None:
    """What attention makes of x and a copy of the cache."""
    keys, values = (torch.cat([t, t[:, :, :1]], dim=2) for t in (cached.keys, cached.values))
    return attend(x, kwargs[POSITIONS], keys, values, cached.keys.shape[-2], kwargs.get(MASK))


class TrialCache:
    """A cache of one layer that stays as it was."""

    def __init__(self, layer: Growing) -> None:
        self.keys, self.values = layer.keys, layer.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What was there and what comes."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
