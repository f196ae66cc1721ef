"""coterie convert verify: a packed checkpoint against its source."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.console import console, significant, table
from coterie.cli.convert_cpu import parse_layers
from coterie.cli.progress import ConversionProgress


def verify(
    packed: Annotated[Path, typer.Argument(help="Folder of a packed checkpoint.")],
    source: Annotated[Path, typer.Argument(help="The folder or GGUF file that it was packed from.")],
    layers: Annotated[str | None, typer.Option(help="Only these layers, like 0-3 or 5. [default: all]")] = None,
    tokens: Annotated[int, typer.Option(help="Random tokens.")] = 16,
    tolerance: Annotated[
        float, typer.Option(help="Relative error up to which a layer is what it should be.")
    ] = 0.3,
) -> None:
    """Compare packed experts with their source: each layer's weights, and its output on random tokens.

    Packed linear layers outside the experts are compared too, unless --layers is given.

    Exit code 0 if all relative errors are within the tolerance, else 1. Rounding to 4 bits makes 0.1 to 0.2, weights
    that are not the source's more than 1.
    """
    from coterie.convert.verify import verify
    from coterie.hf.converting import verify_linears

    with ConversionProgress() as progress:
        checks = verify(packed, source, parse_layers(layers) if layers else None, tokens, progress)
    linears = None if layers else verify_linears(packed, source)
    names = list(checks[0].errors)
    rows = table("relative errors, of weights the worst expert's", "layer", *names, "output")
    for check in checks:
        worst = (significant(check.errors[name].worst) for name in names)
        rows.add_row(str(check.layer), *worst, significant(check.output_error))
    console.print(rows)
    wrong = [check.layer for check in checks if not check.worst <= tolerance]
    if wrong:
        named = ", ".join(map(str, wrong))
        console.print(f"[red]Layers {named} are not what {source} holds[/]: beyond {tolerance:g}.", highlight=False)
    else:
        console.print(f"[green]All {len(checks)} layers are within {tolerance:g}.[/]", highlight=False)
    beyond = linears is not None and linears.count > 0 and not linears.worst <= tolerance
    if linears is not None and linears.count:
        said = f"[red]beyond {tolerance:g}[/]" if beyond else f"[green]within {tolerance:g}[/]"
        console.print(
            f"{linears.count} linear layers: mean {significant(linears.mean)}, worst {significant(linears.worst)}, "
            f"{linears.worst_name}: {said}.",
            highlight=False,
        )
    if wrong or beyond:
        raise typer.Exit(1)
