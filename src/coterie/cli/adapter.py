"""coterie adapter: adapters for servers, merged into checkpoints, and out of other layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.console import console, facts, significant, size
from coterie.errors import ArgumentError

app = typer.Typer(help="Convert, export and merge LoRA adapters.", no_args_is_help=True)

Adapter = Annotated[Path, typer.Option("--adapter", "-a", help="Folder of a PEFT LoRA adapter.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="New or empty folder.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Its base model. [default: what the adapter was trained on]")
]


@app.command()
def export(adapter: Adapter, output: Output, model: Model = None) -> None:
    """Write an adapter in the names of the base's checkpoint: where that stores experts apart, each has its own LoRA.

    vLLM and SGLang were reported to drop or transpose LoRA of 3-D experts; none has been tried with what is written.
    """
    need_peft()
    from coterie.adapters.export import export_adapter

    done = export_adapter(adapter, output, model)
    summary = facts(f"{output}: LoRA in the names of the checkpoint")
    summary.add_row("experts", str(done.experts) if done.experts else "stacked by layer, as in the checkpoint")
    summary.add_row("tensors", str(done.tensors))
    summary.add_row("size", size(done.nbytes))
    console.print(summary)


@app.command()
def convert(
    adapter: Adapter,
    output: Output,
    written_by: Annotated[
        str,
        typer.Option(
            "--from",
            help="What wrote it: peft-0.19.0 (or an older PEFT), unsloth (before 2026-09-17), or kt (kt-kernel).",
        ),
    ],
    model: Model = None,
) -> None:
    """Lay LoRA of experts out as PEFT has it since 0.19.1: coterie and PEFT then load it.

    Unsloth's old adapters bear no mark: one that is converted though it need not be computes nonsense.
    """
    need_peft()
    from coterie.adapters.convert import convert_adapter

    done = convert_adapter(adapter, output, written_by, model)
    summary = facts(f"{output}: LoRA as PEFT lays it out")
    summary.add_row("experts", str(done.experts))
    summary.add_row("tensors", str(done.tensors))
    summary.add_row("size", size(done.nbytes))
    console.print(summary)


@app.command()
def merge(
    adapter: Adapter,
    output: Output,
    model: Model = None,
    experts: Annotated[
        str,
        typer.Option("--experts", help="bf16: a plain checkpoint; int8 or int4: packed, linear layers as in the base."),
    ] = "bf16",
) -> None:
    """Merge an adapter into its base model, and say what rounding it costs.

    The base, plain or packed, is merged an expert at a time. A tokenizer beside the adapter replaces the base's.
    """
    need_peft()
    from coterie.adapters.merge import merge_adapter

    done = merge_adapter(adapter, output, model, experts)
    summary = facts(f"{output}: the merged model, experts in {done.format}")
    summary.add_row("experts' parameters", str(done.experts))
    summary.add_row("rounding to the model's dtype", f"{significant(done.rounding_error)} (worst expert)")
    if done.quantisation_error:
        summary.add_row(f"quantising to {done.format}", f"{significant(done.quantisation_error)} (worst expert)")
    if done.linears:
        summary.add_row(f"linear layers in {done.linears}", f"{significant(done.linear_error)} (worst layer)")
    console.print(summary)


def need_peft() -> None:
    """Raises ArgumentError where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ArgumentError(f"adapters need {error.name}: pip install 'coterie[train]'") from None
