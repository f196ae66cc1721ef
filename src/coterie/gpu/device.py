"""The device that the rest of a model is on."""

from __future__ import annotations

import torch

from coterie.errors import ArgumentError, DeviceError


def usable(device: str | int | torch.device) -> torch.device:
    """`device` as torch has it. Raises ArgumentError for one without values, DeviceError where there is no such one."""
    if str(device) == "meta":
        raise ArgumentError("device='meta': expected a device that holds values, 'cpu' or 'cuda' for instance")
    try:
        return torch.empty(0, device=device).device
    except Exception as error:  # AssertionError from a torch without CUDA, else RuntimeError
        reason = str(error).splitlines()[0]
        raise DeviceError(f"device={str(device)!r} cannot be used here: {reason}; leave it out, or use 'cpu'") from None
