"""The parameter that stands in a module where packed expert weights were: shape, dtype and values, but no storage."""

from __future__ import annotations

import logging
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from coterie.errors import ArgumentError

logger = logging.getLogger(__name__)

aten = torch.ops.aten
# Ops that give the same weights again, maybe in another dtype; the packed bytes are shared and stay on the CPU.
SAME = {aten.detach.default, aten.alias.default, aten.clone.default, aten.lift_fresh.default}
EMPTY = {aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default}


class Packed(Protocol):
    """Where the values of a module's packed parameters are."""

    @property
    def format(self) -> str: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dense(self, name: str, dtype: torch.dtype) -> Tensor: ...


class PackedWeight(Tensor):
    """A frozen parameter whose values are packed, in a `PackedModule` of experts for instance.

    It has the logical shape and dtype of the parameter it replaces (so that PEFT, parameter counts and `.to()` see what
    they expect) and takes no memory. Reading it gives the values that the kernels compute with: `weight[expert]`
    dequantises one expert, any other op the whole tensor. Writing to it raises ArgumentError.
    """

    packed: Packed
    parameter: str

    @staticmethod
    def __new__(cls, packed: Packed, name: str, dtype: torch.dtype) -> PackedWeight:
        weight = Tensor._make_wrapper_subclass(cls, packed.shape(name), dtype=dtype, device="cpu")
        weight.packed = packed
        weight.parameter = name
        return weight

    def dense(self) -> Tensor:
        """The whole tensor, dequantised, in this parameter's dtype."""
        nbytes = self.numel() * self.element_size()
        if nbytes >= 1 << 26:
            logger.warning("dequantising %s %s: %d MiB", self.parameter, list(self.shape), nbytes >> 20)
        return self.packed.dense(self.parameter, self.dtype)

    def _is(self, other: Any) -> bool:
        return isinstance(other, PackedWeight) and (other.packed, other.parameter) == (self.packed, self.parameter)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"PackedWeight({self.parameter} {list(self.shape)}, {self.packed.format}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict) -> Tensor:
        return nn.Parameter(PackedWeight(self.packed, self.parameter, self.dtype), requires_grad=False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ArgumentError(f"{self.parameter} is packed and cannot be pickled; save the model with save_pretrained()")

    def storage(self) -> Any:
        """Asked for by safetensors when it finds no memory behind a tensor."""
        raise ArgumentError(f"{self.parameter} is packed and has no storage; save the model with save_pretrained()")

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, PackedWeight):
            if func in SAME:
                return PackedWeight(first.packed, first.parameter, first.dtype)
            if func is aten._to_copy.default:
                return PackedWeight(first.packed, first.parameter, kwargs.get("dtype") or first.dtype)
            if func in EMPTY:
                kwargs.setdefault("dtype", first.dtype)
                plain = torch.empty(first.shape, dtype=first.dtype, device="meta")
                return func(plain, *args[1:], **{**kwargs, "device": kwargs.get("device") or "cpu"})
            if func is aten.select.int and args[1] == 0 and first.dim() == 3:
                return first.packed.dense_expert(first.parameter, int(args[2]) % first.shape[0], first.dtype)
            if func is aten.copy_.default and first._is(args[1]):
                return first
            if func is aten.split.Tensor and (args[2] if len(args) > 2 else kwargs.get("dim", 0)) == 0:
                raise ArgumentError(
                    f"{first.parameter} is packed and cannot be sharded: each process keeps all of it; leave it out, "
                    "fully_shard(..., ignored_params=coterie.hf.packed_parameters(model))"
                )
        if func._schema.is_mutable and any(_written(func, args, kwargs)):
            raise ArgumentError(
                f"{func.__name__} would write to packed weights, which are frozen: load new weights with "
                "coterie.from_pretrained(), train them through LoRA"
            )
        return func(*_dense(args), **_dense(kwargs))


def packed_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of a model whose values are packed, each process's own; FSDP2 is to leave them alone:

    fully_shard(layer, ignored_params=packed_parameters(model))
    """
    return {p for p in model.parameters() if isinstance(p, PackedWeight)}


def _written(func, args, kwargs):
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield isinstance(value, PackedWeight)


def _dense(tree):
    return torch.utils._pytree.tree_map_only(PackedWeight, PackedWeight.dense, tree)
