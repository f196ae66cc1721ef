"""Norms, routers and linear layers of bf16 that take as little time while a model decodes as their work is small: by
the engine, a call each, or on a GPU by a kernel. Torch reads bf16 for one row at a third of the memory's speed.

Norms and routers are found by their structure and proved by trying them, with weights of our own: what the module
answers is what the engine must answer. Prompts and whatever is trained are the modules' own, with gradients and
without: so a reference computes what the policy does, and a checkpointed layer what it did before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from coterie import _native
from coterie.border import runs_now
from coterie.gpu import fast
from coterie.hf.mixed import mixed

FEW, FEW_ON_GPU = 16, 256  # sequences, or tokens of a router
FEW_OF_LINEAR = 4  # rows of a plain linear layer: torch is as fast from eight on
ROWS = 16  # that are tried
# What bf16 and float32 leave open: a step of the result, sums in another order.
TOLERANCE = {torch.bfloat16: 2**-7, torch.float32: 1e-5}


def quicken(model: nn.Module) -> None:
    """Has the norms, routers and linear layers of a model become such wherever they can be."""
    known: dict[Any, Any] = {}
    for module in list(model.modules()):
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and module.weight.is_cpu:
            module.__class__ = mixed(QuickLinear, nn.Linear)
            continue
        parameters = dict(module.named_parameters(recurse=False))
        weight = parameters.pop("weight", None)
        if weight is None or parameters.keys() - {"bias"} or any(module.children()) or weight.dtype not in TOLERANCE:
            continue
        for find in (norm_options, router_options):
            key = (find, type(module), weight.shape, weight.dtype, *parameters, *sorted(_settings(module).items()))
            if key not in known:
                known[key] = find(module)
            if known[key] is not None:
                module.__class__ = mixed(QuickNorm if find is norm_options else QuickRouter, type(module))
                module.quick, module.quick_dtype = known[key], weight.dtype


def _settings(module: nn.Module) -> dict[str, Any]:
    """The numbers that a module was made with."""
    return {name: value for name, value in vars(module).items() if isinstance(value, int | float)}


def _decodes(module: nn.Module, x: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a call is one that the engine takes: plain rows, nothing else, no gradients, and not while training."""
    alone = isinstance(x, Tensor) and not args and not kwargs
    return alone and not module.training and not torch.is_grad_enabled() and runs_now() and not x.is_neg()


def _is_few(x: Tensor, count: int) -> bool:
    """Whether there is a quick way for so many rows, where they are."""
    return count <= FEW if x.is_cpu else count <= FEW_ON_GPU and fast.usable(x.device)


def _normed(x: Tensor, weight: Tensor, options: tuple[float, bool, bool]) -> Tensor | None:
    if x.is_cpu:
        return _native.rms_norm(x, weight, *options)
    from coterie.gpu.kernels import token

    return token.rms_norm(x, weight, *options)


def _routed(
    x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, normalised: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Logits [T, E], weights [T, K] in `dtype`, experts [T, K]."""
    if x.is_cpu:
        found = _native.route(x, weight, bias, top_k, normalised)
        return None if found is None else (found[0], found[1].to(dtype), found[2])
    if x.dtype != weight.dtype or x.dtype not in TOLERANCE:
        return None
    from coterie.gpu.kernels import token

    logits = functional.linear(x, weight, bias)
    return logits, *token.choose(logits, top_k, normalised, dtype)


class QuickNorm(nn.Module):
    """Mixed into the class of an RMSNorm; `quick`: the arguments of `_native.rms_norm`."""

    quick: tuple[float, bool, bool]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [B, T, ..., H] -> its norm, in its dtype."""
        if _decodes(self, x, args, kwargs) and x.dim() > 2 and x.shape[1] == 1 and _is_few(x, len(x)):
            out = _normed(x, self.weight, self.quick)
            if out is not None:
                return out
        return super().forward(x, *args, **kwargs)


class QuickLinear(nn.Module):
    """Mixed into the class of a linear layer of plain weights."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        plain = _decodes(self, input, (), {}) and input.is_cpu and input.dtype == torch.bfloat16
        if plain and 0 < input.numel() <= FEW_OF_LINEAR * input.shape[-1]:
            out = _native.plain_linear(input, self.weight, self.bias)
            if out is not None:
                return out
        return super().forward(input)


class QuickRouter(nn.Module):
    """Mixed into the class of a router; `quick`: the arguments of `_native.route`, and the weights' dtype, of rows of
    `quick_dtype`."""

    quick: tuple[int, bool, torch.dtype]
    quick_dtype: torch.dtype

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """x [..., H] -> logits [T, E], weights [T, K], experts [T, K]."""
        if _decodes(self, x, args, kwargs) and x.dtype == self.quick_dtype and _is_few(x, x.shape[:-1].numel()):
            found = _routed(x.reshape(-1, x.shape[-1]), self.weight, getattr(self, "bias", None), *self.quick)
            if found is not None:
                return found
        return super().forward(x, *args, **kwargs)


def norm_options(module: nn.Module) -> tuple[float, bool, bool] | None:
    """`QuickNorm.quick` of a module that is an RMSNorm; None for any other."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if module.weight.dim() != 1 or not isinstance(epsilon, float) or getattr(module, "bias", None) is not None:
        return None
    weight, x = _tried(module)
    x *= torch.logspace(-4, 1, ROWS)[:, None].to(x.dtype)  # small ones show epsilon
    expected = _answer(module, weight, x)
    if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
        return None
    best, least = None, TOLERANCE[x.dtype]
    for rounded, from_one in ((True, False), (False, False), (False, True)):
        found = _native.rms_norm(x, weight, epsilon, rounded, from_one)
        difference = 1.0 if found is None else _difference(found, expected)
        if difference < least:
            best, least = (epsilon, rounded, from_one), difference
    return best


def router_options(module: nn.Module) -> tuple[int, bool, torch.dtype] | None:
    """`QuickRouter.quick` of a module that takes the largest of a softmax; None for any other."""
    top_k = getattr(module, "top_k", None)
    if module.weight.dim() != 2 or not isinstance(top_k, int) or not 0 < top_k <= len(module.weight):
        return None
    weight, x = _tried(module)
    bias = None if getattr(module, "bias", None) is None else weight[:, 0].contiguous()
    answer = _answer(module, weight, x, bias)
    shapes = [(ROWS, len(weight)), (ROWS, top_k), (ROWS, top_k)]
    if not isinstance(answer, tuple) or [getattr(t, "shape", None) for t in answer] != shapes:
        return None
    logits, weights, experts = answer
    if experts.dtype != torch.int64 or logits.dtype != x.dtype:
        return None
    for normalised in (True, False):
        found = _native.route(x, weight, bias, top_k, normalised)
        if found is None:
            return None
        # Of equal logits either may be taken.
        taken = found[0].gather(1, found[2]), logits.gather(1, experts)
        pairs = (found[0], logits), (found[1], weights), taken
        if all(_difference(a, b) < TOLERANCE[x.dtype] for a, b in pairs):
            return top_k, normalised, weights.dtype
    return None


def _tried(module: nn.Module) -> tuple[Tensor, Tensor]:
    """A random weight for the module, and random rows [ROWS, H]."""
    random = torch.Generator().manual_seed(0)
    shape, dtype = module.weight.shape, module.weight.dtype
    x = torch.randn(ROWS, shape[-1], generator=random)
    return torch.randn(shape, generator=random).mul(0.1).to(dtype), x.to(dtype)


def _answer(module: nn.Module, weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Any:
    """What the module's own code makes of x; None where it wants something else."""
    parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    try:
        with torch.no_grad():
            return functional_call(module, parameters, (x,))
    except Exception:
        return None


def _difference(a: Tensor, b: Tensor) -> float:
    """The largest, as a part of the largest value."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30)).item()
