"""Which experts of a model go to its GPU, and whether those in RAM are sent there for calls of many tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from coterie.errors import ArgumentError
from coterie.gpu.streaming import Streaming

AUTO, STREAM = "auto", "stream"


def streamed(gpu_experts: Any) -> Streaming | None:
    """Of "stream" and "stream:256", from 256 tokens on; None for all else, with which experts are not sent."""
    if not isinstance(gpu_experts, str) or gpu_experts.partition(":")[0] != STREAM:
        return None
    _, colon, tokens = gpu_experts.partition(":")
    if colon and not tokens.isdecimal():
        raise ArgumentError(
            f'gpu_experts: expected "stream", or "stream:256" for 256 tokens or more, found {gpu_experts!r}'
        )
    return Streaming(int(tokens) if colon else None)


def chosen(gpu_experts: Any, counts: Sequence[int], most: Callable[[], int] | None = None) -> list[tuple[int, ...]]:
    """The experts of each layer that go to the GPU; `counts`: how many each has.

    gpu_experts: None and "stream", for none; "all"; "auto", where `most` says for how many of each layer there is room
    (`Room.most`); a number for each layer, or a fraction of it in (0, 1], rounded; a bool mask [layers, experts], True
    for the GPU. All but a mask take the first ones. Raises ArgumentError for anything else.
    """
    if gpu_experts is None or streamed(gpu_experts):
        return [()] * len(counts)
    if isinstance(gpu_experts, str):
        if gpu_experts == AUTO and most is not None:
            number = most()
            return [tuple(range(min(number, count))) for count in counts]
        if gpu_experts != "all":
            raise _refused(gpu_experts, counts)
        return [tuple(range(count)) for count in counts]
    if isinstance(gpu_experts, bool):
        raise _refused(gpu_experts, counts)
    if isinstance(gpu_experts, int):
        if not 0 <= gpu_experts <= min(counts):
            raise _refused(gpu_experts, counts)
        return [tuple(range(gpu_experts))] * len(counts)
    if isinstance(gpu_experts, float):
        if not 0 < gpu_experts <= 1:
            raise _refused(gpu_experts, counts)
        return [tuple(range(round(gpu_experts * count))) for count in counts]
    try:
        rows = [torch.as_tensor(row, device="cpu") for row in gpu_experts]
    except (TypeError, ValueError, RuntimeError):
        raise _refused(type(gpu_experts).__name__, counts) from None
    if [tuple(row.shape) for row in rows] != [(count,) for count in counts] or any(r.dtype != torch.bool for r in rows):
        found = f"{type(gpu_experts).__name__} of {len(rows)} rows" + (f" of {rows[0].dtype}" if rows else "")
        raise _refused(found, counts)
    return [tuple(row.nonzero()[:, 0].tolist()) for row in rows]


def read(text: str) -> str | int | float:
    """`gpu_experts` as it stands on a command line: a name, "all" for instance, or the number or fraction it is.

    Raises ArgumentError for anything else.
    """
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    if text not in ("all", AUTO) and not streamed(text):
        raise ArgumentError(
            "gpu_experts: expected all, auto, stream, a number of each layer's experts or a fraction in (0, 1], "
            f"found {text!r}"
        )
    return text


def _refused(found: Any, counts: Sequence[int]) -> ArgumentError:
    experts = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    return ArgumentError(
        f'gpu_experts: expected "all", "auto", "stream", a number of each layer\'s {experts} experts, a fraction in '
        f"(0, 1], or a bool mask of {len(counts)} layers by experts, found {found!r}"
    )
