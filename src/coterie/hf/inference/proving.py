"""What modules that the engine takes the place of are proved by, and whether somebody listens to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.utils import output_capturing

COLLECTOR = "_active_collector"
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
