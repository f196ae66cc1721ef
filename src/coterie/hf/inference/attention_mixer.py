"""Attention with the norm before it, its projections, the cache, and what it is added to, as one call of the engine."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coterie import _native
from coterie.hf.dense import PackedLinear
from coterie.hf.inference.attention import NAME, NAME_EAGER
from coterie.hf.inference.growing import ARGUMENTS, Growing
from coterie.hf.inference.norms import QuickNorm
from coterie.hf.inference.proving import same

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")
SINKS = "sinks"
POSITIONS, MASK = "position_embeddings", "attention_mask"
IMPLEMENTATION = "_attn_implementation_internal"
LARGE = 64.0
LANES = 16  # columns of a head, and of its values, are a multiple of


class AttentionMixer:
    """Attention. `halved`: embeddings of positions are of half the columns that turn; without a `norm` alone, not added
    to its input."""

    PLACE = "self_attn"
    WAYS: tuple[Any, ...] = (False, True)  # that a module may turn queries and keys to their positions: `halved`

    @staticmethod
    def fits(module: nn.Module | None) -> bool:
        """Whether a module may be such."""
        parts = {} if module is None else dict(module.named_children())
        norms = [parts.pop(name) for name in HEAD_NORMS if name in parts]
        projections = [parts.pop(name, None) for name in PROJECTIONS]
        packed = all(isinstance(p, PackedLinear) for p in projections)
        if not packed or not all(isinstance(n, QuickNorm) for n in norms):
            return False
        _, k, _, _ = projections
        head = getattr(module, "head_dim", 0)
        return (
            not any(True for part in parts.values() for _ in part.parameters())
            and not {name for name, _ in module.named_parameters(recurse=False)} - {SINKS}
            and len(norms) in (0, len(HEAD_NORMS))
            and isinstance(head, int)
            and head > 0
            and head % LANES == 0
            and all(hasattr(module, name) for name in ("scaling", "layer_idx", "config"))
            and k.out_features % head == 0
            and _gates(module) is not None
        )

    @staticmethod
    def projections(module: nn.Module) -> list[Any]:
        """Those of such a module, the last behind what it attends to."""
        return [module._modules[name] for name in PROJECTIONS]

    @staticmethod
    def memory(module: Any, cache: Any) -> Growing | None:
        """A module's part of a cache, if that has room and the engine attends; None for a module of another kind."""
        layers = getattr(cache, "layers", ())
        index, config = getattr(module, "layer_idx", None), getattr(module, "config", None)
        if index is None or config is None:
            return None
        found = layers[index] if index < len(layers) else None
        # Past the configuration's own look-up, which takes longer than all else that is asked here.
        attends = object.__getattribute__(config, IMPLEMENTATION) in (NAME, NAME_EAGER)
        return found if attends and isinstance(found, Growing) and found.has_room() else None

    @classmethod
    def found(
        cls, module: Any, norm: QuickNorm, random: Tensor, kwargs: dict[str, Any], memory: Growing
    ) -> AttentionMixer | None:
        """The one that answers as the module does and caches the same, with the norm before it; None for neither.

        Rows as large as the second's show whether the module limits them. All but the token itself would drown there.
        """
        least = torch.finfo(random.dtype).min
        itself = random.new_full((len(random), 1, 1, memory.keys.shape[-2] + 1), least)
        itself[..., -1] = 0
        trials = [(random, kwargs), (random * LARGE, {**kwargs, MASK: itself})]
        asked = [(x, cls.on_trial(module, given, memory)) for x, given in trials]
        answers = [module(hidden_states=x, **given) for x, given in asked]
        cached = [next(v for v in given.values() if isinstance(v, TrialCache)).new for _, given in asked]
        if any(len(answer) != 2 or answer[1] is not None for answer in answers):
            return None
        expected = [(answer[0], *new) for answer, new in zip(answers, cached, strict=True)]
        for way in cls.WAYS:
            mixer = cls(module, None, way)
            found = [mixer._tried(x, given, memory) for x, given in trials]
            if all(same(f, e) for pair in zip(found, expected, strict=True) for f, e in zip(*pair, strict=True)):
                return cls(module, norm, way)
        return None

    def __init__(self, module: Any, norm: QuickNorm | None, halved: bool) -> None:
        self._norm, self._module = norm, module
        self._head_norms = [module._modules[name] for name in HEAD_NORMS if name in module._modules]
        _, k, v, _ = projections = self.projections(module)
        self._weights = [p.packed.linear.weight for p in projections]
        head, self._scaling = module.head_dim, module.scaling
        options = [None if norm is None else norm.quick, *([n.quick for n in self._head_norms] or [None, None])]
        whole = bool(self._head_norms) and self._head_norms[0].weight.numel() != head
        value_dim = v.out_features // (k.out_features // head)
        shape = head, value_dim, module.scaling, halved, bool(_gates(module))
        self._engine = _native.AttentionStep(*self._weights, *options, whole, *shape)

    @property
    def attending(self) -> float:
        """Seconds that attention itself has taken in all calls, without what is before and behind it."""
        return self._engine.attending

    def __call__(self, x: Tensor, kwargs: dict[str, Any], memory: Growing) -> Tensor | None:
        """x [B, 1, H] -> what attention makes of it, which is in the cache then. None for what it does not take."""
        keys, values = memory.rooms
        used = keys.used - keys.start
        found = self._attend(x, kwargs[POSITIONS], keys.from_start(), values.from_start(), used, kwargs.get(MASK))
        if found is not None:
            memory.grown()
        return found

    def tried(self, x: Tensor, kwargs: dict[str, Any], memory: Growing) -> Tensor | None:
        """The same with a copy of the cache."""
        return self._tried(x, kwargs, memory)[0]

    def _tried(self, x: Tensor, kwargs: dict[str, Any], memory: Growing) -> tuple[Tensor | None, Tensor, Tensor]:
        """The same, and what that got: keys and values of a position."""
        keys, values = (torch.cat([t, t[:, :, :1]], dim=2) for t in (memory.keys, memory.values))
        found = self._attend(x, kwargs[POSITIONS], keys, values, memory.keys.shape[-2], kwargs.get(MASK))
        return found, keys[:, :, -1:], values[:, :, -1:]

    @staticmethod
    def on_trial(module: nn.Module, kwargs: dict[str, Any], memory: Growing) -> dict[str, Any]:
        """What a layer is called with, and a cache that stays as it is."""
        return {k: TrialCache(memory) if k in ARGUMENTS and v is not None else v for k, v in kwargs.items()}

    def _attend(self, x: Tensor, angles: Any, keys: Tensor, values: Tensor, used: int, mask: Any) -> Tensor | None:
        """Keys and values [B, heads, room, D] get position `used`."""
        q, k, v, o = [weight.uses_int8() for weight in self._weights]
        if not q == k == v or type(angles) is not tuple or self._module.scaling != self._scaling:
            return None
        norm = None if self._norm is None else self._norm._parameters["weight"]
        head_norms = [n._parameters["weight"] for n in self._head_norms] or (None, None)
        sinks = self._module._parameters.get(SINKS)
        return self._engine(x, norm, *head_norms, *angles, keys, values, used, mask, sinks, q, o)


def _gates(module: nn.Module) -> bool | None:
    """Whether there is a gate behind each head of queries; None where sizes do not go together."""
    q, k, v, o = AttentionMixer.projections(module)
    heads = {o.in_features * k.out_features: False, 2 * o.in_features * k.out_features: True}
    return heads.get(q.out_features * v.out_features) if q.out_features % k.out_features == 0 else None


class TrialCache:
    """A cache of one layer that stays as it was. new: the keys and values that came."""

    new: tuple[Tensor, ...] = ()

    def __init__(self, layer: Growing) -> None:
        self.keys, self.values = layer.keys, layer.values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What was there and what comes."""
        self.new = key_states, value_states
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)
