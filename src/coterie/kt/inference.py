"""Experts of one layer for inference: forwards that are submitted and waited for, with experts deferred to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coterie.errors import ArgumentError, StateError
from coterie.kt import deferral
from coterie.kt.layer import LayerExperts
from coterie.kt.options import Options
from coterie.kt.streams import on_stream
from coterie.tickets import Ticket


@dataclass(slots=True)
class Forward:
    """A forward that was submitted.

    now: of the immediate experts. later: of the deferred ones. before: what the layer before this one deferred.
    """

    now: Ticket
    later: Ticket | None
    before: Ticket | None
    waiting: deferral.Waiting


class InferenceExperts(LayerExperts):
    """Made by `KTMoEWrapper(mode="inference")`.

    Tensors may be on any device: those on a GPU are copied to RAM and the result back on `cuda_stream`, a
    torch.cuda.Stream or the handle of one; None: the current stream. `submit_forward` waits for the inputs, so no CUDA
    graph captures the calls. Other tensors need no stream.

    Submitted forwards are computed one after the other in a thread of the process. Inputs are copied when they are
    submitted. Those of several batches may be outstanding: a batch is known by where `hidden_states` lies.

    Deferred experts: with `max_deferred_experts_per_token`, each token's experts of the lowest scores are computed
    while the model goes on, and their sum is added to the result of layer `layer_idx + 1` for the same thread and
    number of tokens. Batches of one size that take turns must do so in the same order in every layer. A call that fails
    leaves what is deferred for the next attempt. A batch that is given up between two layers leaves its sum to the next
    batch of its size; `clear_buffer_cache()` drops it. The last layer must defer nothing.
    """

    def __init__(self, options: Options):
        super().__init__(options)
        self.max_deferred_experts_per_token = options.max_deferred_experts_per_token
        self._submitted: dict[tuple[int, torch.Size], Forward] = {}

    def select_deferred_experts(
        self, expert_ids: Tensor, expert_scores: Tensor, protected_k: int
    ) -> tuple[Tensor, Tensor]:
        """(immediate, deferred) ids [T,K]: each id [T,K] in one of the two, -1 in the other.

        Immediate are each token's `protected_k` experts of the highest scores [T,K]; none where it is 0 or less.
        Raises ArgumentError for shapes that differ.
        """
        if expert_ids.dim() != 2 or expert_scores.shape != expert_ids.shape:
            raise ArgumentError(
                f"expert_scores: expected the shape [T,K] of expert_ids, {list(expert_ids.shape)}, found "
                f"{list(expert_scores.shape)}"
            )
        return deferral.select(expert_ids, expert_scores, protected_k)

    def submit_forward(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, cuda_stream: Any = None
    ) -> None:
        """Begins a forward and returns at once; the same `hidden_states` submitted again replaces it.

        Args:
            hidden_states: [T,H], float. topk_ids: slots [T,K], -1 for none. topk_weights: [T,K], float.

        Raises StateError before weights are loaded, ArgumentError for shapes, dtypes and ids that do not fit.
        """
        experts = self._loaded()
        with on_stream(cuda_stream, hidden_states.device):
            hidden, ids, weights = self._batch(hidden_states, topk_ids, topk_weights)
        immediate, deferred = ids, None
        if self.max_deferred_experts_per_token:
            protected = self.num_experts_per_tok - self.max_deferred_experts_per_token
            immediate, deferred = deferral.select(ids, weights, protected)
        with torch.no_grad():
            now = experts.submit(hidden, immediate, weights)
            later = None if deferred is None else experts.submit(hidden, deferred, weights)
        key = _key(hidden_states)
        replaced = self._submitted.pop(key, None)
        waiting = deferral.waiting()
        before = replaced.before if replaced else waiting.take(self.layer_idx - 1, hidden.shape)
        self._submitted[key] = Forward(now, later, before, waiting)

    def sync_forward(self, hidden_states: Tensor, cuda_stream: Any = None) -> Tensor:
        """The result [T,H] of the forward that was submitted with `hidden_states`, on its device and in its dtype.

        Raises StateError where there is none; else what the forward raised.
        """
        key = self._key_of(hidden_states)
        forward = self._submitted[key]
        shape = key[1]
        try:
            out = forward.now.wait()
            if forward.before is not None:
                out = out + forward.before.wait()
        except Exception:
            del self._submitted[key]
            if forward.before is not None:
                forward.waiting.put_back(self.layer_idx - 1, shape, forward.before)
            raise
        del self._submitted[key]
        if forward.later is not None:
            forward.waiting.leave(self.layer_idx, shape, forward.later)
        with on_stream(cuda_stream, hidden_states.device):
            return out.to(hidden_states.device, hidden_states.dtype)

    def forward(
        self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, cuda_stream: Any = None
    ) -> Tensor:
        """`submit_forward`, then `sync_forward`."""
        self.submit_forward(hidden_states, topk_ids, topk_weights, cuda_stream)
        return self.sync_forward(hidden_states, cuda_stream)

    def _key_of(self, hidden: Tensor) -> tuple[int, torch.Size]:
        """The batch of these hidden states, or, of other ones, the only batch of their shape."""
        key = _key(hidden)
        if key in self._submitted:
            return key
        same = [other for other in self._submitted if other[1] == hidden.shape]
        if not same:
            raise StateError(f"no forward of {list(hidden.shape)} hidden_states: call submit_forward() first")
        if len(same) > 1:
            raise StateError(
                f"{len(same)} forwards of {list(hidden.shape)} hidden_states are outstanding: expected one of theirs"
            )
        return same[0]


def _key(hidden: Tensor) -> tuple[int, torch.Size]:
    return hidden.data_ptr(), hidden.shape
