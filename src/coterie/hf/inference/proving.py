"""Which calls the engine answers in the place of modules, what they are proved by, and who listens to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.utils import output_capturing

from coterie.border import runs_now
from coterie.gpu import fast

COLLECTOR = "_active_collector"
FEW, FEW_ON_GPU = 16, 256  # sequences, or tokens of a router
ROWS = 16  # that norms and routers are tried with
# What bf16 and float32 leave open of one operation: a step of the result, sums in another order.
STEP = {torch.bfloat16: 2**-7, torch.float32: 1e-5}
TOLERANCE = {torch.bfloat16: 2**-5, torch.float32: 1e-4}  # what roundings on the way leave open
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 2**-21}  # of a sum


def same(found: Tensor | None, expected: Tensor) -> bool:
    """Whether the engine's answer is the module's, by the largest difference beside the largest value."""
    if found is None or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    difference = (found.float() - expected.float()).abs().max()
    return bool(difference <= TOLERANCE[found.dtype] * expected.float().abs().max())


def adds_same(found: Tensor | None, expected: Tensor, x: Tensor) -> bool:
    """The same for sums with x, by what is added to it: that may be small beside x."""
    if found is None or (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    added, difference = (expected.float() - x.float()).abs().max(), (found.float() - expected.float()).abs().max()
    return bool(difference <= TOLERANCE[found.dtype] * added + ROUNDING[found.dtype] * expected.float().abs().max())


def is_silent(module: Any) -> bool:
    """Whether nobody listens to a module, nor has put another forward in it."""
    own = module.__dict__
    if own["_forward_pre_hooks"] or "forward" in own:
        return False
    return not own["_forward_hooks"] or not is_heard(own["_forward_hooks"])


def is_heard(hooks: dict[int, Any]) -> bool:
    """Whether hooks are other than those that Transformers leaves where outputs were asked for once."""
    collector = getattr(output_capturing, COLLECTOR, None)
    idle = collector is not None and not collector.get()  # of what is asked for now
    return not idle or any(getattr(hook, "__module__", "") != output_capturing.__name__ for hook in hooks.values())


def decodes(module: nn.Module, x: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a call is one that the engine takes: plain rows, nothing else, no gradients, and not while training."""
    alone = isinstance(x, Tensor) and not args and not kwargs
    return alone and not module.training and not torch.is_grad_enabled() and runs_now() and not x.is_neg()


def is_few(x: Tensor, count: int) -> bool:
    """Whether there is a quick way for so many rows, where they are."""
    return count <= FEW if x.is_cpu else count <= FEW_ON_GPU and fast.usable(x.device)


def tried(module: nn.Module) -> tuple[Tensor, Tensor]:
    """A random weight for the module, and random rows [ROWS, H]."""
    random = torch.Generator().manual_seed(0)
    shape, dtype = module.weight.shape, module.weight.dtype
    x = torch.randn(ROWS, shape[-1], generator=random)
    return torch.randn(shape, generator=random).mul(0.1).to(dtype), x.to(dtype)


def answer(module: nn.Module, weight: Tensor, x: Tensor, others: dict[str, Tensor] | None = None) -> Any:
    """What the module's own code makes of x, with that weight and other parameters or buffers; None where it wants
    something else."""
    try:
        with torch.no_grad():
            return functional_call(module, {"weight": weight, **(others or {})}, (x,))
    except Exception:
        return None


def difference(a: Tensor, b: Tensor) -> float:
    """The largest, as a part of the largest value."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-30)).item()
