"""Transformers' dynamic cache, appended to where it lies: its own copies all keys and values for each new token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ARGUMENTS = ("past_key_values", "cache")  # its names in a model's forward, before Transformers 5.24 and since
MOST_ROOM = 1 << 12  # positions


class Room:
    """Memory [B, heads, positions, D] whose first positions are in use, and maybe seen by views."""

    def __init__(self, like: Tensor, positions: int) -> None:
        batch, heads, _, width = like.shape
        self.memory = like.new_empty((batch, heads, positions, width))
        self.used = 0

    def takes(self, before: Tensor, new: Tensor) -> bool:
        """Whether `before` is all that is in use here, and `new` may be written behind it."""
        same = (before.dtype, before.shape[:2], before.shape[3:]) == (new.dtype, new.shape[:2], new.shape[3:])
        return same and self.goes_on(before, new.shape[-2])

    def goes_on(self, before: Tensor, positions: int) -> bool:
        """Whether `before` is all that is in use here, and so many positions may be written behind it."""
        memory = self.memory
        return (
            before.dim() == memory.dim()
            and before.shape[-2] == self.used
            and before.data_ptr() == memory.data_ptr()
            and self.used + positions <= memory.shape[-2]
            and not (memory.is_inference() and not torch.is_inference_mode_enabled())
        )

    def append(self, new: Tensor) -> Tensor:
        """All that is in use, with `new`."""
        end = self.used + new.shape[-2]
        self.memory[:, :, self.used : end] = new
        return self.grown(new.shape[-2])

    def grown(self, positions: int) -> Tensor:
        """All that is in use, with so many positions more."""
        self.used += positions
        return self.memory[:, :, : self.used]


class GrowingLayer(DynamicLayer):
    """A layer of a cache with room behind its keys and values. What another layer, a copy of this one, has appended
    there is not written over: then, and after whatever else has changed the tensors, they are moved to a new place."""

    rooms: tuple[Room, Room] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of all positions, [B, heads, positions, D]."""
        learns = torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad)
        if learns or torch.compiler.is_compiling() or key_states.dim() != 4:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, new = (self.keys, self.values), (key_states, value_states)
        if self.rooms is None or not all(map(Room.takes, self.rooms, before, new)):
            self.rooms = tuple(_moved(b, n) for b, n in zip(before, new, strict=True))
        self.keys, self.values = (room.append(n) for room, n in zip(self.rooms, new, strict=True))
        return self.keys, self.values

    def has_room(self) -> bool:
        """Whether one position may be written behind those in use."""
        if self.rooms is None:
            return False
        keys, values = self.rooms
        return keys.goes_on(self.keys, 1) and values.goes_on(self.values, 1)

    def grown(self) -> None:
        """Takes in the position that was written."""
        self.keys, self.values = (room.grown(1) for room in self.rooms)  # type: ignore[union-attr]


def _moved(before: Tensor, new: Tensor) -> Room:
    """Room that holds `before`, and in which there is some for what comes after `new`."""
    positions = new.shape[-2] + (before.shape[-2] if before.numel() else 0)
    room = Room(new, positions + min(max(positions // 4, 64), MOST_ROOM))
    if before.numel():
        room.append(before)
    return room


def grow_in_place(model: nn.Module) -> None:
    """Has the dynamic caches that a model is given become such."""
    model.register_forward_pre_hook(make_growing, with_kwargs=True)


def make_growing(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
    if torch.compiler.is_compiling():
        return
    for name in ARGUMENTS:
        cache = kwargs.get(name)
        if type(cache) is not DynamicCache or cache.offloading:
            continue
        if cache.layer_class_to_replicate is DynamicLayer:
            cache.layer_class_to_replicate = GrowingLayer
        for layer in cache.layers:
            if type(layer) is DynamicLayer:
                layer.__class__ = GrowingLayer
