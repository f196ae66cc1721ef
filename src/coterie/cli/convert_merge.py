"""coterie convert merge: loose packed layers as one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.console import console, facts, significant, size, telling_of_ctrl_c


def merge(
    input_path: Annotated[
        list[Path],
        typer.Option("--input-path", "-i", help="Folder of packed layers, loose or in folders; may be repeated."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New or empty folder for the packed checkpoint.")],
    original_path: Annotated[
        Path | None, typer.Option(help="What they were packed from: all but its experts is copied. [default: left out]")
    ] = None,
    max_tensors: Annotated[
        int | None, typer.Option(min=1, help="Tensors in a file of the rest, at most; experts stay a file a layer.")
    ] = None,
) -> None:
    """Put together what `coterie convert cpu` packed with --no-merge-safetensor or --layers, on one machine or several.

    With --original-path the result is what a conversion of all layers at once writes, byte for byte.
    """
    from coterie.hf.converting import merge

    with telling_of_ctrl_c(lambda: f"nothing is kept in {output}"):
        done = merge(input_path, output, original_path, max_tensors)
    summary = facts("Layers put together")
    summary.add_row("folder", str(output))
    summary.add_row("layers", f"{len(done.layers)}, experts in {done.formats.described}")
    summary.add_row("rest", "copied" if done.whole else "left out: give --original-path for a model that loads")
    summary.add_row("size", size(done.bytes))
    summary.add_row("time", f"{significant(done.seconds)} s")
    console.print(summary)
