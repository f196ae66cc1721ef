"""Transformers' dynamic cache, appended to where it lies: its own copies all keys and values for each new token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ARGUMENTS = ("past_key_values", "cache")  # its names in a model's forward, before Transformers 5.24 and since
MOST_ROOM = 1 << 12  # positions


class Room:
    """Memory [B, heads, positions, D], of which those from `start` to `used` are in use, and maybe seen by views."""

    def __init__(self, like: Tensor, positions: int) -> None:
        batch, heads, _, width = like.shape
        self.memory = like.new_empty((batch, heads, positions, width))
        self.start = self.used = 0

    def takes(self, before: Tensor, new: Tensor) -> bool:
        """Whether `before` is all that is in use here, and `new` may be written behind it."""
        same = (before.dtype, before.shape[:2], before.shape[3:]) == (new.dtype, new.shape[:2], new.shape[3:])
        return same and self.goes_on(before, new.shape[-2])

    def goes_on(self, before: Tensor, positions: int) -> bool:
        """Whether `before` is all that is in use here, and so many positions may be written behind it."""
        memory = self.memory
        return (
            before.dim() == memory.dim()
            and before.shape[-2] == self.used - self.start
            and before.data_ptr() == memory.data_ptr() + self.start * memory.stride(2) * memory.element_size()
            and self.used + positions <= memory.shape[-2]
            and not (memory.is_inference() and not torch.is_inference_mode_enabled())
        )

    def from_start(self) -> Tensor:
        """The memory from the first position in use on."""
        return self.memory[:, :, self.start :] if self.start else self.memory

    def append(self, new: Tensor) -> Tensor:
        """All that is in use, with `new`."""
        end = self.used + new.shape[-2]
        self.memory[:, :, self.used : end] = new
        return self.grown(new.shape[-2])

    def grown(self, positions: int) -> Tensor:
        """All that is in use, with so many positions more."""
        self.used += positions
        return self.memory[:, :, self.start : self.used]

    def last(self, positions: int) -> Tensor:
        """The last of those in use, so many at most; no others are from now on."""
        self.start = max(self.start, self.used - positions)
        return self.memory[:, :, self.start : self.used]


class Growing(DynamicLayer):
    """Mixed into a layer of a cache: there is room behind its keys and values. What another layer, a copy of this one,
    has appended there is not written over: then, and after whatever else has changed the tensors, they are moved to a
    new place."""

    rooms: tuple[Room, Room] | None = None

    def has_room(self) -> bool:
        """Whether one position may be written behind those in use."""
        if self.rooms is None:
            return False
        keys, values = self.rooms
        return keys.goes_on(self.keys, 1) and values.goes_on(self.values, 1)

    def grown(self) -> None:
        """Takes in the position that was written."""
        self.keys, self.values = (room.grown(1) for room in self.rooms)  # type: ignore[union-attr]

    def _appended(self, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """All keys and values in use, with new ones."""
        before = self.keys, self.values
        if self.rooms is None or not all(map(Room.takes, self.rooms, before, new)):
            self.rooms = tuple(_moved(b, n) for b, n in zip(before, new, strict=True))
        return tuple(room.append(n) for room, n in zip(self.rooms, new, strict=True))


class GrowingLayer(Growing):
    """Of full attention."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of all positions, [B, heads, positions, D]."""
        if not _is_plain(key_states, value_states):
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys, self.values = self._appended((key_states, value_states))
        return self.keys, self.values


class GrowingSlidingLayer(Growing, DynamicSlidingWindowLayer):
    """Of attention to a window: what fell out of it is moved away from once there is no room behind it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The keys and values of the window and of all new positions, [B, heads, positions, D]."""
        if not _is_plain(key_states, value_states) or self._keeps_more:
            return super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[-2] > 1 or not self.is_initialized:
            found = super().update(key_states, value_states, *args, **kwargs)
            self.rooms = tuple(_moved(kept, kept[:, :, :0]) for kept in (self.keys, self.values))
            self._slide()
            return found
        self.cumulative_length += 1
        found = self._appended((key_states, value_states))
        self._slide()
        return found

    def has_room(self) -> bool:
        """Whether one position may be written behind those in use."""
        return super().has_room() and not self._keeps_more

    def grown(self) -> None:
        """Takes in the position that was written."""
        super().grown()
        self.cumulative_length += 1
        self._slide()

    @property
    def _keeps_more(self) -> bool:
        """Whether tokens may be taken back, so that more than the window is kept."""
        return getattr(self, "record_past", False)

    def _slide(self) -> None:
        self.keys, self.values = (room.last(self.sliding_window - 1) for room in self.rooms)  # type: ignore[union-attr]


def _is_plain(keys: Tensor, values: Tensor) -> bool:
    learns = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
    return not learns and not torch.compiler.is_compiling() and keys.dim() == 4


def _moved(before: Tensor, new: Tensor) -> Room:
    """Room that holds `before`, and in which there is some for what comes after `new`."""
    positions = new.shape[-2] + (before.shape[-2] if before.numel() else 0)
    room = Room(new, positions + min(max(positions // 4, 64), MOST_ROOM))
    if before.numel():
        room.append(before)
    return room


GROWING = {DynamicLayer: GrowingLayer, DynamicSlidingWindowLayer: GrowingSlidingLayer}


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
            layer.__class__ = GROWING.get(type(layer), type(layer))
