"""What torch does not offer of NVIDIA's driver: functions of the engine that a stream calls when it comes to them."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from coterie import _native
from coterie.errors import DeviceError

RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
NO_WAITING = 1  # CU_USER_OBJECT_NO_DESTRUCTOR_SYNC
MOVED = 1  # CU_GRAPH_USER_OBJECT_MOVE
_used: set[torch.device] = set()


def launch(call: _native.StreamCall, device: torch.device) -> None:
    """Queues a call behind what is on a device's current stream, or puts it into the graph that this captures.

    Raises DeviceError where the driver refuses."""
    with torch.cuda.device(device):
        stream, captured = torch.cuda.current_stream().cuda_stream, torch.cuda.is_current_stream_capturing()
        call.launch()
        if captured:
            _retain(call, stream)
        function = _native.StreamCall.replayed if captured else _native.StreamCall.once
        _run("cuLaunchHostFunc", *map(ctypes.c_void_p, (stream, function, call.argument)))
    _used.add(device)


def _retain(call: _native.StreamCall, stream: int) -> None:
    """Has the graph that a stream captures keep a call, and say when it is gone."""
    status, number, graph, held = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p(), ctypes.c_void_p()
    found = map(ctypes.byref, (status, number, graph))
    _run("cuStreamGetCaptureInfo_v2", ctypes.c_void_p(stream), *found, None, None)
    released = ctypes.c_void_p(_native.StreamCall.released)
    _run("cuUserObjectCreate", ctypes.byref(held), ctypes.c_void_p(call.argument), released, 1, NO_WAITING)
    _run("cuGraphRetainUserObject", graph, held, 1, MOVED)


def pinned(nbytes: int) -> Tensor:
    """Uint8 [nbytes] in pinned memory, which can be had while a stream is captured too."""
    mode = ctypes.c_int(RELAXED)
    _run("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    finally:
        _run("cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))


def _run(name: str, *arguments: Any) -> None:
    status = getattr(_library(), name)(*arguments)
    if status:
        raise DeviceError(f"CUDA's driver refused {name} with error {status}")


@functools.cache
def _library() -> Any:
    atexit.register(_finish)
    return ctypes.CDLL("libcuda.so.1")


def _finish() -> None:
    """What streams have yet to call, they call before the process ends."""
    for device in _used:
        with contextlib.suppress(RuntimeError):  # of a GPU that has failed
            torch.cuda.synchronize(device)
