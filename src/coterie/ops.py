"""The forward of a layer of experts as torch sees it: checks, and a custom operator for torch.compile and autograd."""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import ArgumentError

if TYPE_CHECKING:
    from .experts import Experts

DTYPES = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}  # in the order of the native enum

_keys = itertools.count()
_registered: weakref.WeakValueDictionary[int, Experts] = weakref.WeakValueDictionary()


def register(experts: Experts) -> int:
    """A key by which the operator finds the experts; operators take tensors and numbers only."""
    key = next(_keys)
    _registered[key] = experts
    return key


def forward(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """See Experts.__call__."""
    check(experts, x, ids, weights)
    if torch.compiler.is_compiling():
        return experts_forward(x, ids, weights, experts._key)
    return _compute(experts, x, ids, weights)


def check(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Raise ArgumentError for anything the engine cannot take."""
    if x.dim() != 2 or x.shape[1] != experts.hidden_size:
        raise ArgumentError(f"x: expected shape [tokens, {experts.hidden_size}], found {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ArgumentError(f"x: expected bfloat16, float16 or float32, found {x.dtype}")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ArgumentError(f"ids: expected shape [{x.shape[0]}, experts per token], found {list(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"ids: expected int64 or int32, found {ids.dtype}")
    if ids.shape[1] > experts.num_experts:
        raise ArgumentError(f"ids: {ids.shape[1]} experts per token, but there are only {experts.num_experts}")
    if weights.shape != ids.shape:
        raise ArgumentError(f"weights: expected the shape of ids, {list(ids.shape)}, found {list(weights.shape)}")
    if not weights.is_floating_point():
        raise ArgumentError(f"weights: expected a float dtype, found {weights.dtype}")
    for name, tensor in (("x", x), ("ids", ids), ("weights", weights)):
        if tensor.device.type != "cpu":
            raise ArgumentError(f"{name}: expected a CPU tensor, found {tensor.device}")


@torch.library.custom_op("coterie::experts_forward", mutates_args=())
def experts_forward(x: Tensor, ids: Tensor, weights: Tensor, key: int) -> Tensor:
    return _compute(_registered[key], x, ids, weights)


@experts_forward.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, key: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _compute(experts: Experts, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    if x.stride(1) != 1:
        x = x.contiguous()
    ids = ids.to(torch.int64).contiguous()
    weights = weights.to(torch.float32).contiguous()
    out = torch.empty(x.shape, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
    try:
        experts.native.forward(
            x.shape[0], ids.shape[1], x.data_ptr(), DTYPES[x.dtype], x.stride(0), ids.data_ptr(), weights.data_ptr(),
            out.data_ptr(), DTYPES[out.dtype],
        )  # fmt: skip
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    return out.to(x.dtype)
