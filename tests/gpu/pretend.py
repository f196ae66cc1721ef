"""A device that stands in for a GPU: its tensors hold CPU tensors, and every operator refuses to mix the two.

It is torch's PrivateUse1 device, by torch's own means for a backend in Python. It shows where tensors are and what is
copied when; it has no streams, and its copies are done when they return. To torch.accelerator it is not available, so
that other tests of the process go on as before.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

NAME = "pretend"


class _Hook(backend_registration._DummyPrivateUse1Hook):
    def is_available(self) -> bool:
        return False


class _Module(backend_registration._DummyBackendModule):
    def is_available(self) -> bool:
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend(NAME, _Module(), _Hook())
DEVICE = torch.device(NAME, 0)
copied: list[tuple[str, tuple[int, ...], torch.dtype]] = []  # ("host" or "device", shape, dtype) of every copy
_library, _ranges = (torch.library.Library(namespace, "IMPL") for namespace in ("_", "aten"))


class PretendTensor(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendTensor:
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE,
            storage_offset=inner.storage_offset(),
        )  # fmt: skip
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, *args, **kwargs or {})


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator that got a tensor or a device of ours."""
    aten, to = torch.ops.aten, kwargs.get("device")
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if func is aten._to_copy.default and to is not None and torch.device(to).type != tensors[0].device.type:
        here = torch.device(to).type == NAME
        copied.append(("device" if here else "host", tuple(tensors[0].shape), tensors[0].dtype))
        kwargs = kwargs | {"device": "cpu"}
        found = func(args[0] if here else args[0].inner, **kwargs)
        return PretendTensor(found) if here else found
    if func is aten.copy_.default and args[0].device != args[1].device:
        copied.append(("host" if args[0].is_cpu else "device", tuple(args[1].shape), args[1].dtype))
        func(*(t.inner if isinstance(t, PretendTensor) else t for t in args[:2]))
        return args[0]
    strangers = [t for t in tensors if t.is_cpu and t.dim()]
    assert not strangers, f"{func} got {NAME} and CPU tensors, {[tuple(t.shape) for t in strangers]} among them"
    args, kwargs = tree_map_only(PretendTensor, lambda t: t.inner, (args, kwargs))
    if to is not None:
        kwargs["device"] = "cpu"
    found = func(*args, **kwargs)
    if func._schema.is_mutable and tensors:
        return tensors[0]
    return tree_map(lambda leaf: PretendTensor(leaf) if isinstance(leaf, Tensor) else leaf, found)


class Device(TorchFunctionMode):
    """Within it `torch.tensor(..., device="pretend")` works; torch makes such tensors past its Python backends."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is torch.tensor and device is not None and torch.device(device).type == NAME:
            return func(*args, **kwargs | {"device": "cpu"}).to(device)
        return func(*args, **kwargs)


_library.fallback(run, "PrivateUse1")
for _overload in ("default", "start", "start_step"):  # torch's own would resize a tensor, of which ours knows nothing
    _arange = getattr(torch.ops.aten.arange, _overload)
    _ranges.impl(_arange, functools.partial(run, _arange), "PrivateUse1")
