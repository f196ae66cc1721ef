"""Which experts of a model go to the GPU that the rest of it is on: those that were asked for, or that have room."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from coterie.errors import ArgumentError, DeviceError
from coterie.formats import Formats
from coterie.gpu.choice import AUTO, chosen, streamed
from coterie.gpu.device import MEMORY_VARIABLE, check_experts, free_nbytes
from coterie.gpu.resident import piece_nbytes
from coterie.gpu.room import Room, expert_nbytes, token_nbytes
from coterie.hf import skeleton
from coterie.hf.empty import empty_model
from coterie.hf.layout import Layout
from coterie.hf.sizes import bias_nbytes, rest_nbytes


def choose(
    gpu_experts: Any,
    context: int,
    model: PreTrainedModel,
    layouts: dict[str, Layout],
    formats: Mapping[str, Formats],
    device: torch.device,
) -> list[tuple[int, ...]]:
    """The experts of each layer of `model`, which need not have its weights, that go to `device`.

    gpu_experts: as in `chosen`; context: the tokens of the KV cache that "auto" leaves room for.
    Warns where "auto" finds no room. Raises ArgumentError for a choice that is none, DeviceError where the device
    cannot compute experts or its free memory does not hold what is to be there.
    """
    counts = [layout.num_experts for layout in layouts.values()]
    if device.type == "cpu":
        if any(chosen(gpu_experts, counts, lambda: 1)) or streamed(gpu_experts):
            raise ArgumentError('gpu_experts needs a GPU for the rest of the model too: device="cuda"')
        return chosen(None, counts)
    free = free_nbytes(device)
    if free is None and gpu_experts == AUTO:
        raise ArgumentError(
            f'gpu_experts="auto": how much memory of {device} is free is not known: {MEMORY_VARIABLE}=24GB says it'
        )
    room = functools.cache(lambda: find_room(free, piece_nbytes(device), context, model, layouts, formats))
    found = chosen(gpu_experts, counts, lambda: room().most)
    if any(found) or streamed(gpu_experts):
        check_experts(device)
    if gpu_experts == AUTO and not any(found):
        warnings.warn(f'gpu_experts="auto": {shortage(room(), device)}', stacklevel=2)
    elif free is not None:
        sizes = [device_nbytes(layout, formats[name]) for name, layout in layouts.items()]
        experts = sum(len(moved) * size for moved, size in zip(found, sizes, strict=True))
        if rest_nbytes(model, layouts) + experts > free:
            raise DeviceError(too_much(room(), experts, device))
    return found


def find_room(
    free: int,
    piece: int,
    context: int,
    model: PreTrainedModel,
    layouts: dict[str, Layout],
    formats: Mapping[str, Formats],
) -> Room:
    """The memory of a device with `free` bytes, where `piece` bytes of experts are dense at a time, and what `model`
    takes there. Builds it once more, without weights."""
    cache, per_token = skeleton.trace(empty_model(model.config, dtype=model.dtype).eval(), context)
    used = max(per_token.values())
    return Room(
        free=free,
        rest=rest_nbytes(model, layouts),
        cache=cache,
        tokens=context,
        token=max(token_nbytes(used, layout.hidden_size, layout.intermediate_size) for layout in layouts.values()),
        piece=piece,
        layers=tuple((x.num_experts, device_nbytes(x, formats[name])) for name, x in layouts.items()),
    )


@functools.cache
def device_nbytes(layout: Layout, formats: Formats) -> int:
    """Bytes of one expert on a device, biases included."""
    matrices = expert_nbytes(formats, layout.hidden_size, layout.intermediate_size, layout.has_gate)
    return matrices + bias_nbytes(layout)


def shortage(room: Room, device: torch.device) -> str:
    """That no expert has room on `device`, why, and how much is missing."""
    return (
        f"no expert has room on {device} beside the rest of the model ({gigabytes(room.rest)}), a KV cache of "
        f"{room.tokens} tokens ({gigabytes(room.cache)}) and activations ({gigabytes(room.work)}): "
        f"{gigabytes(room.free)} are free, one expert of each layer takes {gigabytes(room.experts(1))}, "
        f"{gigabytes(room.missing)} are missing; all experts are computed in RAM"
    )


def too_much(room: Room, experts: int, device: torch.device) -> str:
    """That the rest of the model and `experts` bytes of experts do not go into `device`, and what would."""
    parts = f"all but the experts ({gigabytes(room.rest)})"
    parts += f" and the experts chosen by gpu_experts ({gigabytes(experts)})" if experts else ""
    if room.rest > room.free:
        instead = "use device='cpu'"
    elif room.most:
        instead = f"gpu_experts={room.most} would fit, with a KV cache of {room.tokens} tokens and activations"
    else:
        instead = "leave gpu_experts out: all experts are then computed in RAM"
    needs = f"{parts} need{'' if experts else 's'} {gigabytes(room.rest + experts)} of memory on {device}"
    return f"{needs}, {gigabytes(room.free)} are free: {instead}; {MEMORY_VARIABLE}=24GB overrides what was found"


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.3g} GB"
