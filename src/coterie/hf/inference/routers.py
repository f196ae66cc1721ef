"""Routers of decoded tokens by one call each of the engine, or of a kernel on a GPU, found by trying them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from coterie import _native
from coterie.hf.inference.proving import ROWS, STEP, answer, decodes, difference, is_few, tried

CORRECTION = "e_score_correction_bias"  # added to scores where experts are chosen, not where they are weighted


@dataclass(frozen=True)
class Routing:
    """What a router computes: the largest `top_k` of a softmax of logits or, with `scores`, of their sigmoids; the
    weights, in `dtype`, add up to one where they are normalised."""

    top_k: int
    normalised: bool
    dtype: torch.dtype
    scores: Scores | None = None


@dataclass(frozen=True)
class Scores:
    """groups: of experts, of which the `kept` are looked at whose best two have the largest sum. scale: of the weights.
    wide: logits are float32."""

    groups: int
    kept: int
    scale: float
    wide: bool

    def native(self, correction: Tensor) -> tuple[Any, ...]:
        """As the engine takes it."""
        return correction, self.groups, self.kept, self.scale, self.wide


class QuickRouter(nn.Module):
    """Mixed into the class of a router; `quick`: what it computes, of rows of `quick_dtype`."""

    quick: Routing
    quick_dtype: torch.dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [..., H] -> logits [T, E], weights [T, K], experts [T, K]."""
        if decodes(self, x, args, kwargs) and x.dtype == self.quick_dtype and is_few(x, x.shape[:-1].numel()):
            found = _routed(x.reshape(-1, x.shape[-1]), self.weight, self.bias_of(), self.native_scores(), self.quick)
            if found is not None:
                return found
        return super().forward(x, *args, **kwargs)

    def bias_of(self) -> Tensor | None:
        """What is added to its logits."""
        return self._parameters.get("bias")

    def native_scores(self) -> tuple[Any, ...] | None:
        """How sigmoids are chosen from, as the engine takes it."""
        scores = self.quick.scores
        return None if scores is None else scores.native(self._buffers[CORRECTION])


def _routed(
    x: Tensor, weight: Tensor, bias: Tensor | None, scores: tuple[Any, ...] | None, routing: Routing
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits [T, E], weights [T, K], experts [T, K]."""
    if x.is_cpu:
        found = _native.route(x, weight, bias, routing.top_k, routing.normalised, scores)
        return None if found is None else (found[0], found[1].to(routing.dtype), found[2])
    if x.dtype != weight.dtype or x.dtype not in STEP or scores is not None:
        return None
    from coterie.gpu.kernels import token

    logits = functional.linear(x, weight, bias)
    return logits, *token.choose(logits, routing.top_k, routing.normalised, routing.dtype)


def router_options(module: nn.Module) -> Routing | None:
    """`QuickRouter.quick` of a module that is a router; None for any other."""
    top_k, correction = getattr(module, "top_k", None), module._buffers.get(CORRECTION)
    if module.weight.dim() != 2 or not isinstance(top_k, int) or not 0 < top_k <= len(module.weight):
        return None
    weight, x = tried(module)
    bias = None if getattr(module, "bias", None) is None else weight[:, 0].contiguous()
    given, scores = {} if bias is None else {"bias": bias}, None
    if correction is not None:
        given[CORRECTION] = torch.linspace(-0.3, 0.3, len(weight)).roll(len(weight) // 3)
    found = answer(module, weight, x, given)
    shapes = [(ROWS, len(weight)), (ROWS, top_k), (ROWS, top_k)]
    if not isinstance(found, tuple) or [getattr(t, "shape", None) for t in found] != shapes:
        return None
    logits, weights, experts = found
    if experts.dtype != torch.int64 or logits.dtype not in (x.dtype, torch.float32):
        return None
    if correction is not None:
        numbers = (getattr(module, name, 1) for name in ("num_group", "topk_group", "routed_scaling_factor"))
        groups, kept, scale = (1 if number is None else number for number in numbers)
        scores = Scores(groups, kept, float(scale), logits.dtype != x.dtype)
    elif logits.dtype != x.dtype:
        return None
    for normalised in (True, False):
        routing = Routing(top_k, normalised, weights.dtype, scores)
        native = None if scores is None else scores.native(given[CORRECTION])
        if _answers(_native.route(x, weight, bias, top_k, normalised, native), logits, weights, experts, x.dtype):
            return routing
    return None


def _answers(found: Any, logits: Tensor, weights: Tensor, experts: Tensor, dtype: torch.dtype) -> bool:
    """Whether the engine's answer is the module's. Experts may be in any order, and of equals either may be taken."""
    if found is None:
        return False
    mine, theirs = found[0].gather(1, found[2]).sort(-1), logits.gather(1, experts).sort(-1)
    weighted = found[1].gather(1, mine.indices), weights.gather(1, theirs.indices)
    pairs = (found[0], logits), (mine.values, theirs.values), weighted
    return all(difference(a, b) < STEP[dtype] for a, b in pairs)
