"""coterie convert compare: two checkpoints, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.console import console, significant, table
from coterie.cli.progress import ConversionProgress

SHOWN = 20


def compare(
    path1: Annotated[Path, typer.Argument(help="A checkpoint: a folder, a .safetensors or a GGUF file.")],
    path2: Annotated[Path, typer.Argument(help="Another.")],
    tolerance: Annotated[
        float, typer.Option(help="Relative error ||A - B|| / ||A|| up to which a tensor counts as the same.")
    ] = 0.0,
    every: Annotated[bool, typer.Option("--all", help=f"Every tensor, not the {SHOWN} that differ most.")] = False,
) -> None:
    """Compare the tensors of two checkpoints: names, shapes, numbers. Exit code 0 if they are the same, else 1.

    Quantised weights count as the numbers they stand for: a checkpoint can be compared with what `dequantize` made of
    it, where rounding to bf16 shows as about 0.0017, and a GGUF file with its original. Packed experts are compared
    byte by byte, packed linear layers by their numbers.
    """
    from coterie.hf.converting import compare

    with ConversionProgress("checkpoint", "tensor") as progress:
        found = compare(path1, path2, tolerance, progress)
    _list(f"in {path1} alone", found.only_a, every)
    _list(f"in {path2} alone", found.only_b, every)
    _list("of different shapes", [f"{name} {list(a)}, {list(b)}" for name, (a, b) in found.shapes.items()], every)
    errors = sorted(found.errors, key=lambda error: -error.relative)
    shown = errors if every else [error for error in errors if error.largest][:SHOWN]
    if shown:
        rows = table("tensors" if every else "tensors that differ most", "", "dtypes", "largest error", "relative")
        for e in shown:
            dtypes = e.dtypes[0] if e.dtypes[0] == e.dtypes[1] else ", ".join(e.dtypes)
            rows.add_row(e.name, dtypes, significant(e.largest), significant(e.relative))
        console.print(rows)
    exact = sum(error.largest == 0 for error in errors)
    console.print(
        f"{len(errors)} tensors compared: {exact} equal, {len(errors) - exact - len(found.beyond)} within a relative "
        f"error of {tolerance:g}, {len(found.beyond)} beyond it.",
        highlight=False,
    )
    console.print("[green]The same.[/]" if found.same else "[red]They differ.[/]")
    if not found.same:
        raise typer.Exit(1)


def _list(title: str, names: Sequence[str], every: bool) -> None:
    """Prints names under a title with their number, if there are any."""
    if not names:
        return
    console.print(f"[bold]{len(names)} {title}[/]", highlight=False)
    shown = names if every else names[:SHOWN]
    for name in shown:
        console.print(f"  {name}", markup=False, highlight=False, soft_wrap=True)
    if len(shown) < len(names):
        console.print(f"  ... and {len(names) - len(shown)} more (--all names them)", highlight=False)
