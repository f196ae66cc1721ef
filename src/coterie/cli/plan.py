"""coterie plan: will a model fit here, and how fast can it be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.console import console, count, significant, size, table
from coterie.errors import CheckpointError


def plan(
    model: Annotated[Path, typer.Argument(help="A model's folder, or its config.json alone; weights are not needed.")],
    experts: Annotated[str | None, typer.Option(help="Only this format of experts: bf16, int8 or int4.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of one sequence, for the size of its KV cache.")] = 4096,
    ram: Annotated[str | None, typer.Option(help="RAM to plan for, like 64GB. Default: this machine's.")] = None,
    vram: Annotated[str | None, typer.Option(help="GPU memory to plan for, like 24GB. Default: none.")] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="RAM read per second, like 50GB. Default: measured here.")
    ] = None,
) -> None:
    """Say whether a model fits in memory, and how fast it can decode at most.

    Builds the model without weights from its config, so it works before a download.
    """
    from coterie import machine
    from coterie import plan as planning

    formats = planning.choices(experts)
    ram_bytes = machine.parse_bytes(ram) if ram else machine.memory_bytes()
    vram_bytes = machine.parse_bytes(vram) if vram else 0
    given = machine.parse_bytes(bandwidth) if bandwidth else None
    anatomy = planning.inspect(model, context)
    speed = given or machine.read_bandwidth()

    shapes = sorted({(layer.layout.num_experts, layer.per_token) for layer in anatomy.experts})
    kinds = ", ".join(f"{k} of {e}" for e, k in shapes)
    console.print(
        f"[bold]{anatomy.model_type}[/]: {count(anatomy.parameters)} parameters, "
        f"{count(anatomy.active_parameters)} read per token; "
        f"{len(anatomy.experts)} layers with experts, {kinds} used per token"
    )
    try:
        stored = planning.stored_nbytes(model)
        if stored:
            console.print("on disk: " + ", ".join(f"{size(n)} of {dtype}" for dtype, n in sorted(stored.items())))
    except CheckpointError as error:
        console.print(f"[yellow]the checkpoint is not complete:[/] {error}")

    console.print(f"rest of the model (attention, router, embeddings) in bf16: {size(anatomy.rest_nbytes)}")
    console.print(f"KV cache of one sequence of {context} tokens: {size(anatomy.cache_nbytes)}")
    estimates = [planning.estimate(anatomy, spec, ram_bytes, vram_bytes, speed) for spec in formats]
    fits_in = f"in {size(ram_bytes)} RAM"
    report = table("", "format", "experts", "RAM needed", "VRAM needed", fits_in, "tokens/s ≤")
    for e in estimates:
        fits = "[green]fits[/]" if e.fits else f"[red]{size(e.ram_short)} short[/]"
        vram_text = size(e.vram) if e.vram else "-"
        report.add_row(e.format, size(e.experts), size(e.ram), vram_text, fits, significant(e.tokens_per_second))
    console.print(report)
    source = "as given" if given else "measured here"
    console.print(
        f"RAM includes {size(planning.RESERVE)} for Python and buffers. Tokens/s: decoding one sequence, if every byte "
        f"that a token needs is read from RAM once, at {size(speed)}/s ({source}).",
        style="dim",
    )
    if estimates[0].vram:
        console.print("[yellow]a look ahead:[/] this version computes everything on the CPU, GPUs come later")
    elif vram_bytes:
        console.print(
            f"[yellow]the rest and the KV cache do not fit {size(vram_bytes)} of VRAM:[/] planned for the CPU alone"
        )
