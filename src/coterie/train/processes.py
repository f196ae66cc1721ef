"""The processes of torchrun."""

from __future__ import annotations

import gc

import torch.distributed as dist


def end_process_group() -> None:
    """Ends the group that training began under torchrun, while Python still runs.

    Gloo's threads let go of a collective's tensors after the collective has returned, and need Python's lock for it:
    one that is late aborts a process whose interpreter is ending ("terminate called without an active exception").
    Ending the group waits for them.
    """
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a trainer is a cycle, whose DistributedDataParallel holds the group
        dist.destroy_process_group()
