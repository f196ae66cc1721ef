"""A decoded token's way through a layer of a model as two calls of the engine: attention, or linear attention, with its
norm, projections and cache; and the norm, router and experts that follow, a shared one too.

Layers are found by their structure and proved by trying them when they decode their first token, with that token's
positions and cache and with rows of our own: what the layer answers is what the engine must answer. Where only
attention can be had so, the layer's own modules do the rest; any other layer goes on as before."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from coterie.border import runs_now
from coterie.hf.dense import PackedLinear
from coterie.hf.inference.attention_mixer import MASK, POSITIONS, AttentionMixer
from coterie.hf.inference.delta_mixer import DeltaMixer
from coterie.hf.inference.gated import QuickGated
from coterie.hf.inference.growing import ARGUMENTS
from coterie.hf.inference.latent_mixer import LatentMixer
from coterie.hf.inference.norms import QuickNorm
from coterie.hf.inference.proving import FEW, TOLERANCE, adds_same, is_silent
from coterie.hf.inference.routers import QuickRouter
from coterie.hf.mixed import mixed
from coterie.hf.modules import packed_module

# What a layer may be called with beside its rows; position_ids say nothing to what mixes tokens and does not take them.
KNOWN = {POSITIONS, MASK, *ARGUMENTS, "position_ids", "use_cache", "cache_position"}
Mixer = AttentionMixer | DeltaMixer
MIXERS: tuple[type[Mixer], ...] = AttentionMixer, LatentMixer, DeltaMixer
TRIALS = 3


def step_at_once(model: nn.Module) -> None:
    """Has the layers of a model become such wherever they can be; its other modules are quickened before."""
    for module in list(model.modules()):
        if (parts := LayerParts.find(module)) is not None:
            module.__class__ = mixed(QuickLayer, type(module))
            module.quick_mixer = parts.mixer


class QuickLayer(nn.Module):
    """Mixed into the class of a layer, of whose kind `quick_mixer` is.

    quick_step: what computes its tokens; None: not tried yet, or tried and found to be something else.
    """

    quick_mixer: type[Mixer]
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
    cache = next((kwargs[name] for name in ARGUMENTS if kwargs.get(name) is not None), None)
    mixer = layer.quick_mixer
    memory = None if cache is None else mixer.memory(layer._modules[mixer.PLACE], cache)
    if memory is None or (step is not None and not step.stands()):
        return None
    if step is None:
        step = layer.quick_step = _proved(layer, x, kwargs, memory)
        layer.step_tried = True
        if step is None:
            return None
    found = step.attend(x, kwargs, memory)
    return None if found is None else step.finish(found)


class LayerParts:
    """The modules of a layer that the engine may take the place of.

    mixing: what `mixer` computes. router, experts: None where `block`, what follows, is more than these and a `shared`
    expert, or something else; `score`: what gives the shared expert's part, or None.
    """

    @classmethod
    def find(cls, layer: nn.Module) -> LayerParts | None:
        """Those of a module; None for what is not such a layer."""
        mixer = mixer_of(layer)
        children = dict(layer.named_children())
        mixing = None if mixer is None else children.get(mixer.PLACE)
        norms = [child for child in children.values() if isinstance(child, QuickNorm)]
        others = [child for child in children.values() if child is not mixing and child not in norms]
        own = any(True for _ in layer.parameters(recurse=False))
        if mixer is None or mixing is None or len(norms) != 2 or len(others) != 1 or own:
            return None
        return cls(layer, mixer, mixing, norms, others[0])

    def __init__(
        self, layer: nn.Module, mixer: type[Mixer], mixing: nn.Module, norms: list[nn.Module], block: nn.Module
    ) -> None:
        self.mixer, self.mixing, self.block, self.norm, self.second_norm = mixer, mixing, block, *norms
        self.projections = mixer.projections(mixing)
        self.packed = [projection.packed for projection in self.projections]
        inside = list(block.children())
        routers = [child for child in inside if isinstance(child, QuickRouter)]
        experts = [child for child in inside if packed_module(child) is not None]
        shared = [child for child in inside if isinstance(child, QuickGated)]
        scores = [child for child in inside if _is_score(child)] if shared else []
        only = len(routers) == len(experts) == 1 and len(shared) < 2 and len(scores) < 2
        only = only and len(inside) == 2 + len(shared) + len(scores)
        self.router, self.experts = (routers[0], experts[0]) if only else (None, None)
        self.shared = shared[0] if only and shared else None
        self.score = scores[0] if only and scores else None
        # Where each part stands: whatever wraps or replaces one ends this.
        self.mixing_places = [({"": layer}, "", layer), *_places(layer), *_places(mixing)]
        self.block_places = [place for owner in (block, *shared) for place in _places(owner)] if only else []

    def stand(self, with_experts: bool) -> bool:
        """Whether they are still where they were, and nobody listens to those that a step takes the place of."""
        if has_global_hooks():
            return False
        for modules, name, part in (*self.mixing_places, *self.block_places):
            called = part is self.block and not with_experts
            if modules[name] is not part or not (called or is_silent(part)):
                return False
        return all(p.__dict__.get("packed") is q for p, q in zip(self.projections, self.packed, strict=True))


def mixer_of(layer: nn.Module) -> type[Mixer] | None:
    """What computes what mixes the tokens of a layer, if that is built as such; its name there is its `PLACE`. Not what
    asks for positions themselves, which may scale queries far from the first one."""
    kind = next((kind for kind in MIXERS if kind.fits(layer._modules.get(kind.PLACE))), None)
    taken = () if kind is None else inspect.signature(layer._modules[kind.PLACE].forward).parameters
    return None if "position_ids" in taken else kind


def _places(owner: nn.Module) -> list[tuple[dict, str, nn.Module]]:
    return [(owner._modules, name, part) for name, part in owner._modules.items()]


def _is_score(module: nn.Module) -> bool:
    plain = isinstance(module, nn.Linear) and not isinstance(module, PackedLinear)
    return plain and module.out_features == 1 and module.bias is None


class LayerStep:
    """A layer by the engine."""

    def __init__(self, parts: LayerParts, mixer: Mixer, with_experts: bool) -> None:
        self.parts, self.attend, self.with_experts = parts, mixer, with_experts

    def modules(self) -> list[nn.Module]:
        """Those that it takes the place of."""
        parts = self.parts
        places = [*parts.mixing_places, *(parts.block_places if self.with_experts else ())]
        return [part for _, _, part in places if part is not parts.block or self.with_experts]

    def stands(self) -> bool:
        """Whether the layer is still what was tried."""
        return self.parts.stand(self.with_experts)

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
        shared = None
        if parts.shared is not None:
            shared = parts.shared.at_once()
            if shared is None:
                return None
            shared = (*shared, None if parts.score is None else parts.score._parameters["weight"])
        if x.dtype != router.quick_dtype:
            return None
        routing, norm = router.quick, parts.second_norm
        return layer.step(
            x, norm._parameters["weight"], norm.quick, router._parameters["weight"], router.bias_of(), routing.top_k,
            routing.normalised, routing.dtype == torch.bfloat16, layer.uses_int8(), shared, router.native_scores(),
        )  # fmt: skip

    def _block(self, x: Tensor) -> Tensor:
        return x + self.parts.block(self.parts.second_norm(x))


def _proved(layer: QuickLayer, x: Tensor, kwargs: dict[str, Any], memory: Any) -> LayerStep | None:
    """What computes a layer's tokens as the layer does; None where that is not found. Rows between two experts, which a
    rounding may send to either, say nothing: so several are tried."""
    parts, best = LayerParts.find(layer), None
    if parts is None or x.dtype not in TOLERANCE or not parts.stand(with_experts=True):
        return None
    for seed in range(TRIALS):
        step = _proved_by(seed, layer, parts, x, kwargs, memory)
        best = step or best
        if best is not None and (best.with_experts or parts.experts is None):
            break
    return best


def _proved_by(
    seed: int, layer: QuickLayer, parts: LayerParts, x: Tensor, kwargs: dict[str, Any], memory: Any
) -> LayerStep | None:
    random = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(x.dtype)
    seen: list[Tensor] = []
    hook = parts.second_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        mixer = parts.mixer.found(parts.mixing, parts.norm, random, kwargs, memory)
        if mixer is None:
            return None
        expected = type(layer).forward(layer, random, **mixer.on_trial(parts.mixing, kwargs, memory))
    except Exception:
        return None
    finally:
        hook.remove()
    if len(seen) != 1 or not adds_same(mixer.tried(random, kwargs, memory), seen[0], random):
        return None
    for with_experts in (False,) if parts.experts is None else (True, False):
        step = LayerStep(parts, mixer, with_experts)
        if adds_same(step.finish(seen[0]), expected, seen[0]):
            return step
    return None
