"""Where Triton's kernels run; elsewhere torch's operators do the same."""

from __future__ import annotations

import functools
import importlib.util

import torch

OLDEST = 8, 0  # compute capability: bfloat16 products


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether `device` is a GPU that the kernels are written for, and Triton is there to compile them."""
    if device.type != "cuda" or torch.version.hip or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= OLDEST
