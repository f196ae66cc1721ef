"""The one place where tensors cross into native code: as addresses, checked, and for the length of one call."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from .errors import ArgumentError

DTYPES = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}  # in the order of the native enum
FLOATS = frozenset(DTYPES)
COMPUTED = frozenset((torch.bfloat16, torch.float32))
TRACING = tuple(getattr(torch._C._TorchDispatchModeKey, kind) for kind in ("FAKE", "PROXY", "FUNCTIONAL"))
BF16, F32, I64, BYTES = (frozenset((t,)) for t in (torch.bfloat16, torch.float32, torch.int64, torch.uint8))


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's values lie in CPU memory as they are: not fake, not on another device, sparse or negated
    lazily, and of no subclass that answers for itself."""
    kind = type(tensor)
    return (
        (kind is Tensor or kind.__torch_dispatch__ is Tensor.__torch_dispatch__)
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and not tensor.is_neg()
    )


def check_device(name: str, tensor: Tensor, device: torch.device | None = None) -> None:
    """Raises ArgumentError unless a tensor is on `device`, None: the CPU."""
    if device is None or device.type == "cpu":
        if not tensor.is_cpu and tensor.device.type != "cpu":
            raise ArgumentError(f"{name}: expected a CPU tensor, found {tensor.device}")
    elif tensor.device != device:
        raise ArgumentError(f"{name}: expected a tensor on {device}, found {tensor.device}")


def runs_now() -> bool:
    """Whether operators called here run at once: nothing traces, transforms or intercepts them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
    )


def is_traced() -> bool:
    """Whether operators called here are traced or transformed; what intercepts them only to look on does not count."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or any(torch._C._get_dispatch_mode(kind) is not None for kind in TRACING)
    )


def address(
    name: str, tensor: Tensor, dtypes: Container[torch.dtype], shape: Sequence[int], rows_apart: bool = False
) -> int:
    """Where the values of a tensor of one of `dtypes` and of `shape` lie, adjacent to each other.

    rows_apart: of two dimensions, of which the first may have any stride.

    Raises ArgumentError for any other tensor, and for one that is not `is_plain`.
    """
    if not is_plain(tensor):
        raise ArgumentError(f"{name}: expected a plain CPU tensor, found {type(tensor).__name__} on {tensor.device}")
    if tensor.dtype not in dtypes:
        raise ArgumentError(f"{name}: found {tensor.dtype}, which is not what the engine takes here")
    if tensor.shape != shape:
        raise ArgumentError(f"{name}: expected shape {list(shape)}, found {list(tensor.shape)}")
    if not (tensor.is_contiguous() or (rows_apart and (tensor.stride(1) == 1 or shape[1] == 1))):
        raise ArgumentError(f"{name}: expected values adjacent in memory, found strides {tensor.stride()}")
    found = tensor.data_ptr()
    if not found and tensor.numel():
        raise ArgumentError(f"{name}: the memory of this tensor was given back")
    return found
