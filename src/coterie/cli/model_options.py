"""Options of the commands that open a model to generate text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from coterie.errors import ArgumentError

Model = Annotated[str, typer.Argument(help="A model's folder or a hub id: plain, quantised or packed.")]
Experts = Annotated[
    str | None, typer.Option(help="Format to pack experts into. [default: int4, or the checkpoint's own]")
]
Dense = Annotated[
    str,
    typer.Option(
        help="Format to pack all other linear layers into; own: those that are quantised as they are; none; or auto: "
        "on a CPU int8, and own of a GGUF file."
    ),
]
Device = Annotated[str, typer.Option(help="Where all but the experts goes: cpu, cuda.")]
GpuExperts = Annotated[
    str | None,
    typer.Option(
        help="Experts on the GPU too, with --device cuda: all, auto (as many of each layer as there is room for), a "
        "number of each layer's, or a fraction; stream: sent there for prompts."
    ),
]
GpuContext = Annotated[int, typer.Option(min=1, help="Tokens of the cache that --gpu-experts auto leaves room for.")]
Mmap = Annotated[bool, typer.Option("--mmap", help="Use a packed checkpoint's experts where they lie.")]


def read_gpu_experts(text: str | None, device: str) -> Any:
    """--gpu-experts as `coterie.from_pretrained` takes it. Raises ArgumentError."""
    from coterie.gpu.choice import read

    if text is not None and device == "cpu":
        raise ArgumentError("--gpu-experts: they are on the GPU that the rest of the model is on: add --device cuda")
    return None if text is None else read(text)
