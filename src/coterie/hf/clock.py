"""Where the time of a model's forward goes: its layers, their products, their attention, and what else there is."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from coterie.hf.dense import PackedLinear
from coterie.hf.inference.gated import QuickGated
from coterie.hf.inference.step import LayerStep
from coterie.hf.modules import packed_module


@dataclass(slots=True)
class Part:
    """A layer, or all that is outside of the layers, in one forward; times in seconds.

    products: in linear layers and experts, which read `nbytes` of weights. attention: of queries to keys and values,
    or the recurrence of linear attention, where a layer decodes at once.
    """

    seconds: float = 0.0
    products: float = 0.0
    attention: float = 0.0
    nbytes: float = 0.0

    @property
    def rest(self) -> float:
        """Norms, routing, positions, the cache, Python, and waiting for threads."""
        return self.seconds - self.products - self.attention


class Clock:
    """Times every forward of a model in a `with` block: `forwards` holds [outside, first layer, second ...] of each.

    For forwards of one token of one sequence: bytes are those of the experts that it names.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.forwards: list[list[Part]] = []
        self._hooks: list[Any] = []
        self._outside = self._now = Part()
        self._begun: list[float] = []

    def __enter__(self) -> Clock:
        self._around(self.model, self._begin_forward, self._end_forward)
        at_once = set[nn.Module]()
        for layer in self.model.get_decoder().layers:
            step = getattr(layer, "quick_step", None)
            if step is None:
                self._around(layer, self._begin_layer, self._end_layer)
            else:
                layer.quick_step = TimedStep(step, self)
                at_once.update(step.modules())
        for module in self.model.modules():
            if module in at_once:
                continue
            if isinstance(module, QuickGated) and module.quick_kind is not None:
                at_once.update(module.children())
                self._around(module, self._begin, self._end_product)
            elif isinstance(module, nn.Linear) or packed_module(module) is not None:
                self._around(module, self._begin, self._end_product)
        name = self.model.config._attn_implementation
        if name in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS[name] = self._timed_attention(ALL_ATTENTION_FUNCTIONS[name])
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for layer in self.model.get_decoder().layers:
            if isinstance(timed := getattr(layer, "quick_step", None), TimedStep):
                layer.quick_step = timed.step
        name = self.model.config._attn_implementation
        if name in ALL_ATTENTION_FUNCTIONS:
            del ALL_ATTENTION_FUNCTIONS[name]  # what is registered stands again

    def _around(self, module: nn.Module, before: Callable, after: Callable) -> None:
        self._hooks.append(module.register_forward_pre_hook(before))
        self._hooks.append(module.register_forward_hook(after, with_kwargs=True))

    def _begin(self, *_: object) -> None:
        self._begun.append(time.perf_counter())

    def _elapsed(self) -> float:
        return time.perf_counter() - self._begun.pop()

    def _begin_forward(self, *_: object) -> None:
        self._outside = self._now = Part()
        self.forwards.append([self._outside])
        self._begin()

    def _end_forward(self, *_: object) -> None:
        self._outside.seconds = self._elapsed() - sum(part.seconds for part in self.forwards[-1][1:])

    def _begin_layer(self, *_: object) -> None:
        self._now = Part()
        self.forwards[-1].append(self._now)
        self._begin()

    def _end_layer(self, *_: object) -> None:
        self._now.seconds = self._elapsed()
        self._now = self._outside

    def _end_product(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        self._now.products += self._elapsed()
        self._now.nbytes += _read_nbytes(module, (*args, *kwargs.values()))

    def _timed_attention(self, attend: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._begin()
            out = attend(*args, **kwargs)
            self._now.attention += self._elapsed()
            return out

        return timed


class TimedStep:
    """A layer's step that tells a clock how long a token takes: from its first question to its last answer."""

    def __init__(self, step: LayerStep, clock: Clock) -> None:
        self.step, self.clock = step, clock

    def stands(self) -> bool:
        """See LayerStep."""
        self.clock._begin_layer()
        return self.step.stands()

    def attend(self, *args: Any) -> Tensor | None:
        """See LayerStep."""
        mixer = self.step.attend
        before, begun = mixer.attending, time.perf_counter()
        out = mixer(*args)
        seconds, attention = time.perf_counter() - begun, mixer.attending - before
        part = self.clock._now
        part.attention += attention
        part.products += seconds - attention
        part.nbytes += sum(p.packed.linear.nbytes for p in self.step.parts.projections)
        return out

    def finish(self, x: Tensor) -> Tensor:
        """See LayerStep."""
        begun = time.perf_counter()
        out = self.step.finish(x)
        if self.step.with_experts:
            self.clock._now.products += time.perf_counter() - begun
            parts = self.step.parts
            packed, top_k = packed_module(parts.experts), parts.router.quick.top_k
            self.clock._now.nbytes += len(x) * top_k * packed.experts.nbytes / packed.layout.num_experts
            self.clock._now.nbytes += 0 if parts.shared is None else _read_nbytes(parts.shared, ())
        self.clock._end_layer()
        return out


def _read_nbytes(module: nn.Module, inputs: tuple) -> float:
    """Bytes of weights that a call reads."""
    packed = packed_module(module)
    if packed is not None:
        ids = next(t for t in inputs if isinstance(t, Tensor) and t.dtype == torch.int64)
        return ids.numel() * packed.experts.nbytes / packed.layout.num_experts
    if isinstance(module, QuickGated):
        return sum(part.packed.linear.nbytes for part in module.children() if isinstance(part, PackedLinear))
    return module.packed.linear.nbytes if isinstance(module, PackedLinear) else module.weight.nbytes
