"""The processes of torchrun, and the device of each."""

from __future__ import annotations

import gc
import os

import torch
import torch.distributed as dist

from coterie.gpu.device import usable


def is_alone() -> bool:
    """Whether this process trains by itself, not one of several that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def own_device(device: str) -> torch.device:
    """What a file's `device` is for this process: of several, each has a GPU of its own.

    Raises DeviceError where there is no such device.
    """
    several = device == "cuda" and not is_alone()
    return usable(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if several else device)


def end_process_group() -> None:
    """Ends the group that training began under torchrun, while Python still runs.

    Gloo's threads let go of a collective's tensors after the collective has returned, and need Python's lock for it:
    one that is late aborts a process whose interpreter is ending ("terminate called without an active exception").
    Ending the group waits for them.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a trainer is a cycle, whose DistributedDataParallel holds the group
        dist.destroy_process_group()
