"""Packed experts on their way from RAM to a device, in pieces: while one is used there, the next is sent."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

STAGED_NBYTES = 1 << 26  # of the packed experts of a piece, if it is more than one

T = TypeVar("T")


def deliver(device: torch.device, pieces: Sequence[Sequence[Tensor]], use: Callable[[Tensor], T]) -> Iterator[T]:
    """For each piece, what `use` makes of it on the device: packed experts, uint8 [nbytes] in RAM -> [n, nbytes] there.

    use: queues work on the stream that is current; what it was given is another piece's as soon as that is done. The
    next piece is sent when it is asked for, while the device does what was queued until then.
    """
    if device.type == "cuda":
        return _overlapped(device, pieces, use)
    return (use(torch.stack(list(piece)).to(device)) for piece in pieces)


def _overlapped(device: torch.device, pieces: Sequence[Sequence[Tensor]], use: Callable[[Tensor], T]) -> Iterator[T]:
    """Two buffers in pinned memory, which a piece is copied to by the CPU, and two on the device.

    The copies between them have a stream of their own. A pinned buffer is written again when its copy is done, which
    the CPU waits for; one on the device when `use` is done with it, which the copy waits for.
    """
    if not pieces:
        return
    shape = max(len(piece) for piece in pieces), pieces[0][0].numel()
    turns = min(2, len(pieces))
    pinned = [torch.empty(shape, dtype=torch.uint8, device="cpu", pin_memory=True) for _ in range(turns)]
    there = [torch.empty(shape, dtype=torch.uint8, device=device) for _ in range(turns)]
    sent: list[torch.cuda.Event | None] = [None] * turns
    computing, copying = torch.cuda.current_stream(device), _copying(device)
    free = [computing.record_event()] * turns  # the memory may have been others' until now
    try:
        for number, piece in enumerate(pieces):
            turn, count = number % turns, len(piece)
            before = sent[turn]
            if before is not None:
                before.synchronize()
            start = 0
            for run in runs(piece):
                pinned[turn][start : start + len(run)].copy_(run)
                start += len(run)
            copying.wait_event(free[turn])
            with torch.cuda.stream(copying):
                there[turn][:count].copy_(pinned[turn][:count], non_blocking=True)
            sent[turn] = copying.record_event()
            computing.wait_stream(copying)
            found = use(there[turn][:count])
            free[turn] = computing.record_event()
            yield found
            del found
    finally:
        computing.wait_stream(copying)  # an error may leave a copy under way into memory that is given back here


def runs(piece: Sequence[Tensor]) -> Iterator[Tensor]:
    """Experts that follow each other in memory as one tensor [n, nbytes]: threads are called up once for a copy."""
    nbytes = piece[0].numel()

    def first(numbered: tuple[int, Tensor]) -> tuple[int, int]:
        i, expert = numbered
        return expert.untyped_storage().data_ptr(), expert.data_ptr() - i * nbytes

    for _, group in itertools.groupby(enumerate(piece), first):
        experts = [expert for _, expert in group]
        yield experts[0].as_strided((len(experts), nbytes), (nbytes, 1))


@functools.cache
def _copying(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies to a device."""
    return torch.cuda.Stream(device)
