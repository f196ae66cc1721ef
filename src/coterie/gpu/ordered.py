"""Experts in RAM for few tokens on a GPU, in the order of its stream: nothing in Python waits.

The stream copies tokens to pinned memory, calls the engine and copies the output back; where it is captured, all of
that becomes part of the graph. What fails there is raised by a later call, and the output is NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coterie import _native, ops
from coterie.border import DTYPES
from coterie.errors import ArgumentError
from coterie.formats import round_up
from coterie.gpu import driver
from coterie.lora import ExpertLora

if TYPE_CHECKING:
    from coterie.experts import Experts

FEW_TOKENS = 64  # of more, the time that waiting takes is small beside what they take
ALIGNED = 64  # bytes


def possible(device: torch.device, tokens: int) -> bool:
    """Whether a call of so many tokens on `device` is made by its stream."""
    return device.type == "cuda" and not torch.version.hip and 0 < tokens <= FEW_TOKENS


def check() -> None:
    """Raises what went wrong in a call since this was last asked, ArgumentError for ids out of range."""
    try:
        _native.StreamCall.check()
    except ValueError as error:
        raise ArgumentError(f"an earlier call of experts, which a GPU's stream made, failed: {error}") from None


def forward(
    experts: Experts,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    lora: ExpertLora | None,
    meanwhile: Callable[[], None] | None,
) -> Tensor:
    """See offload.forward; LoRA's factors are in RAM, and nothing has gradients."""
    check()
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if meanwhile is None:
        _queue(experts, x, ids, weights, lora, out)
    else:
        here, beside = torch.cuda.current_stream(x.device), _stream_beside(x.device)
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            _queue(experts, x, ids, weights, lora, out)
        meanwhile()
        here.wait_stream(beside)
    return out.to(x.dtype)


@functools.cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _queue(
    experts: Experts, x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None, out: Tensor
) -> None:
    """Has the current stream compute `out`."""
    layer, (batch, top_k) = experts._layer, ids.shape
    factors, scalings, shared = ops.prepared(lora)
    integer, addresses = ops.adaptation(layer, factors, scalings, shared)
    parts = [part.contiguous().view(torch.uint8).flatten() for part in (ids.long(), weights.float(), x)]
    starts = [0, parts[0].nbytes, parts[0].nbytes + parts[1].nbytes]
    inputs = torch.cat(parts)
    place = round_up(inputs.nbytes, ALIGNED)
    host = driver.pinned(place + out.nbytes)
    host[: inputs.nbytes].copy_(inputs, non_blocking=True)
    id_at, weight_at, x_at = (host.data_ptr() + start for start in starts)
    call = layer.on_stream(
        (batch, top_k, x_at, DTYPES[x.dtype], x.shape[1], id_at, weight_at, host.data_ptr() + place,
         DTYPES[out.dtype], integer),
        addresses, (host, factors),
    )  # fmt: skip
    driver.launch(call, x.device)
    out.copy_(host[place:].view(out.dtype).view(out.shape), non_blocking=True)
