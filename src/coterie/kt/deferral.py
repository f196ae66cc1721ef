"""Deferred experts: which of a token's experts may wait, and the sums that wait for the next layer."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict, deque

import torch
from torch import Tensor

from coterie.tickets import Ticket


def select(ids: Tensor, scores: Tensor, protected_k: int) -> tuple[Tensor, Tensor]:
    """(immediate, deferred) [T,K]: each id [T,K] in one of the two, -1 in the other.

    Immediate are the `protected_k` experts of each token that have the highest scores [T,K], of equal ones the first;
    none where `protected_k` is 0 or less.
    """
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    now = rank < protected_k
    return ids.masked_fill(~now, -1), ids.masked_fill(now, -1)


class Waiting:
    """The deferred sums of one thread's batches, by (layer, shape of hidden); of the same, the oldest comes first.

    A layer takes what the layer before it left for a batch of the same shape, so batches may take turns: those of one
    shape in any order that is the same in every layer. Threads do not see each other's.
    """

    def __init__(self) -> None:
        self._tickets: defaultdict[tuple[int, torch.Size], deque[Ticket]] = defaultdict(deque)

    def leave(self, layer: int, shape: torch.Size, ticket: Ticket) -> None:
        self._tickets[layer, shape].append(ticket)

    def take(self, layer: int, shape: torch.Size) -> Ticket | None:
        tickets = self._tickets.get((layer, shape))
        return tickets.popleft() if tickets else None

    def put_back(self, layer: int, shape: torch.Size, ticket: Ticket) -> None:
        """For a ticket that was taken and not used: it is the next to be taken again."""
        self._tickets[layer, shape].appendleft(ticket)

    def clear(self) -> None:
        self._tickets.clear()


_of_thread = threading.local()
_all: weakref.WeakSet[Waiting] = weakref.WeakSet()


def waiting() -> Waiting:
    """What waits in this thread."""
    if not hasattr(_of_thread, "waiting"):
        _of_thread.waiting = Waiting()
        _all.add(_of_thread.waiting)
    return _of_thread.waiting


def clear() -> None:
    """Drops all that waits, in every thread."""
    for one in list(_all):
        one.clear()
