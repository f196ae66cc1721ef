"""The device that the rest of a model is on: whether it is there, what it can, and what of its memory is free."""

from __future__ import annotations

import os

import torch

from coterie.errors import ArgumentError, DeviceError
from coterie.memory import parse_bytes

MEMORY_VARIABLE = "COTERIE_VRAM"  # the free memory to count on, where what the system says of it is wrong
BF16 = (8, 0)  # the compute capability since which NVIDIA's GPUs multiply bfloat16


def usable(device: str | int | torch.device) -> torch.device:
    """`device` as torch has it. Raises ArgumentError for one without values, DeviceError where there is no such one."""
    if str(device) == "meta":
        raise ArgumentError("device='meta': expected a device that holds values, 'cpu' or 'cuda' for instance")
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # AssertionError from a torch without CUDA, else RuntimeError
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device={str(device)!r} cannot be used here: {reason}; leave it out, or use 'cpu'") from None


def capability(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a CUDA device; None of another."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def check_experts(device: torch.device) -> None:
    """Raises DeviceError for a GPU that cannot compute experts, whose products are of bfloat16."""
    found = capability(device)
    if found is not None and found < BF16:
        needed, has = (".".join(map(str, version)) for version in (BF16, found))
        raise DeviceError(
            f"{device} has compute capability {has}, experts on a GPU are computed in bfloat16, which needs {needed} "
            "(2020) or newer: leave gpu_experts out, and all experts are computed in RAM"
        )


def free_nbytes(device: torch.device) -> int | None:
    """Bytes of the device's memory that this process can still take, torch's own cache included; None: not known.

    COTERIE_VRAM ("24GB") replaces what the system says.
    """
    given = os.environ.get(MEMORY_VARIABLE)
    if given:
        return parse_bytes(given)
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
