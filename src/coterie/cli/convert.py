"""coterie convert: checkpoints into other formats, and what came of it."""

from __future__ import annotations

import typer

from coterie.cli import convert_cpu

app = typer.Typer(help="Convert checkpoints, put them together, compare them.", no_args_is_help=True)
app.command("cpu")(convert_cpu.cpu)


@app.callback()
def _convert() -> None:
    """Convert checkpoints, put them together, compare them."""
