"""The CUDA stream that a call is ordered on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def on_stream(stream: Any, device: torch.device) -> Iterator[None]:
    """Makes `stream` the current one where tensors are on a CUDA device; elsewhere there are none.

    stream: a torch.cuda.Stream, or the handle of one, an int, 0 for the default stream; None: the current one.
    """
    if device.type != "cuda" or stream is None:
        yield
        return
    if isinstance(stream, int):
        handle = stream
        stream = torch.cuda.ExternalStream(handle, device) if handle else torch.cuda.default_stream(device)
    with torch.cuda.stream(stream):
        yield
