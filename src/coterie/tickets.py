"""The forward of a layer of experts in the background."""

from __future__ import annotations

import atexit
import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _native, ops
from .border import is_plain, runs_now
from .errors import ArgumentError, TicketError
from .lora import ExpertLora

if TYPE_CHECKING:
    from .experts import Experts

atexit.register(_native.end_tickets)


class Ticket:
    """A forward that :meth:`Experts.submit` began; dropping it neither stops the work nor takes its memory away."""

    def __init__(self, native: Any, out: Tensor, dtype: torch.dtype) -> None:
        self._native, self._out, self._dtype = native, out, dtype
        self._turn = threading.Lock()
        self._result: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether :meth:`wait` answers at once, be it with an error."""
        return bool(self._native.done)

    def wait(self) -> Tensor:
        """The output [T,H] in x's dtype: the same tensor, or the same error, every time. Ctrl-C ends the waiting alone.

        Raises:
            TicketError: the process was forked before the ticket was waited for, and this is the child; or Python ended
                before the work began.
            Exception: whatever the same call of the experts would have raised while it computed.
        """
        if self._result is None:
            try:
                self._native.wait()
            except _native.TicketLost as error:
                raise TicketError(str(error)) from None
            with self._turn:
                if self._result is None:
                    same = self._out.dtype == self._dtype
                    self._result = self._out if same else self._out.to(self._dtype)
        return self._result


def submit(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None = None) -> Ticket:
    """See Experts.submit."""
    given = ops.checked(experts, x, ids, weights, lora)
    if ops.needs_gradients(x, weights, *given):
        raise ArgumentError(
            "submit: computes without gradients, but x, weights or lora requires grad; use torch.no_grad(), or call "
            "the experts"
        )
    if not runs_now() or not all(is_plain(t) for t in (x, ids, weights, *given)):
        raise ArgumentError(
            "submit: expected plain CPU tensors and nothing that traces, transforms or intercepts the call; call the "
            "experts instead"
        )
    factors, scalings, shared = ops.prepared(lora)
    factors = [factor if factor is None else factor.detach() for factor in factors]
    copies = ids.to(torch.int64, copy=True), weights.to(torch.float32, copy=True)  # ids stay those that were checked
    inputs = ops._inputs(experts._layer, x.detach(), *copies, factors, scalings, shared)
    try:
        native = ops._run(experts._layer, *inputs, owners=(inputs, factors))
    except _native.TicketLost as error:
        raise TicketError(str(error)) from None
    return Ticket(native, inputs[3], x.dtype)
