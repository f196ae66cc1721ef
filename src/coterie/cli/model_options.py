"""Options of the commands that open a model to generate text."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A model's folder or a hub id: plain, quantised or packed.")]
Experts = Annotated[
    str | None, typer.Option(help="Format to pack experts into. [default: int4, or the checkpoint's own]")
]
Dense = Annotated[str, typer.Option(help="Format to pack all other linear layers into, none, or auto: int8 on a CPU.")]
Device = Annotated[str, typer.Option(help="Where all but the experts goes: cpu, cuda.")]
Mmap = Annotated[bool, typer.Option("--mmap", help="Use a packed checkpoint's experts where they lie.")]
