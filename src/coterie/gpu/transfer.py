"""Copies of activations and gradients between a device and RAM."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Transfer:
    """The copies of one call of experts in RAM, for any device: each is done when it returns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies in RAM, rows adjacent; their values are there when this returns."""
        return [tensor.to("cpu").contiguous() for tensor in tensors]

    def to_device(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Copies on the device, for work that is queued there after this returns; the originals may then change."""
        return [tensor.to(self.device) for tensor in tensors]


class CudaTransfer(Transfer):
    """On the stream that is current when it is made; the backward pass asks for copies from other threads.

    What goes to RAM lies in pinned memory there, of which torch keeps a cache, and is waited for once. What the experts
    computed lies in ordinary memory: CUDA has staged it when the copy returns.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.stream = torch.cuda.current_stream(device)

    def to_host(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.cuda.stream(self.stream):
            copies = [
                torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True).copy_(
                    tensor.contiguous(), non_blocking=True
                )
                for tensor in tensors
            ]
            self.stream.synchronize()
        return copies

    def to_device(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.cuda.stream(self.stream):
            return [tensor.to(self.device, non_blocking=True) for tensor in tensors]


def transfer(device: torch.device) -> Transfer:
    """What copies from and to `device`, for one call."""
    return CudaTransfer(device) if device.type == "cuda" else Transfer(device)
