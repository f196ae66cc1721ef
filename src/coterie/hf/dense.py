"""The linear layers of a model outside its experts, packed: attention, dense MLPs, shared experts, the head."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from coterie.checkpoints.codes import Codes
from coterie.checkpoints.packed_formats import OWN
from coterie.errors import ArgumentError, CheckpointError
from coterie.formats import Format
from coterie.hf.layout import is_experts
from coterie.hf.weight import PackedWeight
from coterie.linear import Linear


@dataclass(frozen=True, slots=True, eq=False)
class PackedMatrix:
    """What stands behind the `PackedWeight` of a linear layer. Never changes, so copies of a module share it."""

    linear: Linear

    def __deepcopy__(self, memo: dict) -> PackedMatrix:
        return self

    @property
    def format(self) -> str:
        return self.linear.spec.name

    def shape(self, name: str) -> tuple[int, int]:
        return self.linear.out_features, self.linear.in_features

    def dense(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.linear.dequantize().to(dtype)


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed. It stays an nn.Linear: what adapts or looks at those finds it."""

    packed: PackedMatrix

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            raise ArgumentError(
                f"{self}: packed weights are frozen, and this one is to be trained: open the model with dense=None, or "
                "train it through LoRA"
            )
        return self.packed.linear(x)

    def extra_repr(self) -> str:
        linear = self.packed.linear
        return f"{super().extra_repr()}, packed as {linear.spec.described}, {linear.nbytes / 1e6:,.1f} MB"


def packed_linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    """The packed linear layers of a model: (module name, packed weight), in order."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module.packed.linear


def chosen_linears(model: PreTrainedModel, spec: Format | None, skip: Sequence[str] = ()) -> list[str]:
    """The linear layers to be packed as `spec`: all but routers and those whose names match a pattern in `skip`.

    None: in formats of their own. Raises ArgumentError for a pattern that matches no layer, for a layer whose columns
    the group size does not divide, and for a model without linear layers.
    """
    names = list(linear_names(model))
    for pattern in skip:
        if names and not any(re.search(pattern, name) for name in names):
            parts = dict.fromkeys(part for name in names for part in (name.rpartition(".")[2], name))
            near = difflib.get_close_matches(pattern, parts, n=1, cutoff=0)[0]
            raise ArgumentError(
                f"dense_skip: {pattern!r} matches none of the {len(names)} linear layers; the nearest name is {near}"
            )
    chosen = [name for name in names if not any(re.search(pattern, name) for pattern in skip)]
    if not chosen:
        left = f": dense_skip leaves out all {len(names)}" if names else ""
        asked = OWN if spec is None else spec.name
        raise ArgumentError(f"dense={asked!r}: {type(model).__name__} has no linear layers to pack{left}")
    for name in chosen if spec is not None else ():
        columns = model.get_submodule(name).in_features
        try:
            spec.check_columns(name, columns)
        except ArgumentError as error:
            last = re.escape(name.rpartition(".")[2])
            raise ArgumentError(
                f"dense={spec.name!r}: {name} has {columns} columns, not a multiple of its group size, "
                f"{spec.group_size}: choose a format without groups, int8 say, or leave it out: dense_skip=[{last!r}]"
            ) from error
    return chosen


def pack_linears(
    model: PreTrainedModel,
    names: Sequence[str],
    spec: Format | None,
    codes: Callable[[str, Format | None], Codes | None],
) -> None:
    """Packs linear layers of a model as `spec`; `codes` gives those of a layer that is quantised so already.

    None: such layers as they are, and no others. Raises CheckpointError for a weight that the format cannot hold.
    """
    for name in logging.tqdm(names, desc=f"Packing linear layers as {spec.described if spec else 'they are'}"):
        module, stored = model.get_submodule(name), codes(name, spec)
        own = spec or (stored and stored.spec)
        if own is None:
            continue
        try:
            packed = Linear.empty(module.out_features, module.in_features, module.bias, format=own)
            packed.pack_codes(stored) if stored else packed.pack_weight(module.weight)
        except ArgumentError as error:
            raise CheckpointError(f"{name}: {error}; dense_skip leaves layers out") from error
        attach(module, packed)


def linear_names(model: PreTrainedModel) -> Iterator[str]:
    """The linear layers that can be packed: not routers, which stand beside the experts they choose.

    A router is one linear layer, or has one inside; a shared expert, which stands there too, has several.
    """
    routers = set[nn.Module]()
    for module in model.modules():
        if any(is_experts(child) for child in module.children()):
            for child in module.children():
                inside = [part for part in child.modules() if type(part) is nn.Linear]
                routers.update(inside if len(inside) == 1 else ())
    for name, module in model.named_modules():
        if type(module) is nn.Linear and module not in routers:
            yield name


def attach(module: nn.Linear, linear: Linear) -> None:
    """Puts a packed weight into a linear layer in the place of its own."""
    module.__class__ = PackedLinear
    module.packed = PackedMatrix(linear)
    weight = PackedWeight(module.packed, "weight", module.weight.dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.weight._is_hf_initialized = True


def detach(module: PackedLinear, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Puts the dequantised weight back."""
    module.weight = nn.Parameter(module.packed.dense("weight", dtype).to(device), requires_grad=False)
    del module.packed
    module.__class__ = nn.Linear
