"""What memory a model takes that is open, and where it is, in words."""

from __future__ import annotations

from typing import Any

from coterie.cli.console import size


def memory_in_use() -> str:
    """Of this process: "1.2 GB of RAM, 3.4 GB on the GPU"."""
    import torch

    from coterie.bench.memory import resident

    on_gpu = f", {size(torch.cuda.memory_allocated())} on the GPU" if torch.cuda.is_initialized() else ""
    return f"{size(resident())} of RAM{on_gpu}"


def where_it_is(model: Any) -> str | None:
    """One line for a model that is not all in RAM: where it is and the memory it takes; None for one that is."""
    from coterie.hf.modules import packed_modules

    if model.device.type == "cpu":
        return None
    layers = {(len(packed.experts.moved), packed.experts.num_experts) for _, packed in packed_modules(model)}
    if all(moved == count for moved, count in layers):
        there = "all, experts too"
    elif not any(moved for moved, _ in layers):
        there = "all but the experts"
    else:
        parts = [f"{moved} of each layer's {count}" for moved, count in sorted(layers)]
        there = f"all but the experts, and {' or '.join(parts)}"
    return f"on {model.device}: {there}; {memory_in_use()}"
