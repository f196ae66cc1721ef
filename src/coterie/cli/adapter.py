"""coterie adapter: adapters for servers, and merged into checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.console import console, facts, significant, size
from coterie.errors import ArgumentError

app = typer.Typer(help="Export and merge LoRA adapters.", no_args_is_help=True)

Adapter = Annotated[Path, typer.Option("--adapter", "-a", help="Folder of a PEFT LoRA adapter.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="New or empty folder.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", help="Its base model. [default: what the adapter was trained on]")
]


@app.command()
def export(adapter: Adapter, output: Output, model: Model = None) -> None:
    """Write each expert's LoRA as 2-D tensors (...experts.5.gate_proj.lora_A.weight), for servers without 3-D ones.

    vLLM and SGLang were reported to drop or transpose LoRA of 3-D experts; none has been tried with what is written.
    """
    need_peft()
    from coterie.adapters.export import export_adapter

    done = export_adapter(adapter, output, model)
    summary = facts(f"{output}: LoRA of single experts")
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
        str, typer.Option("--experts", help="bf16: a plain checkpoint; int8 or int4: packed again.")
    ] = "bf16",
) -> None:
    """Merge an adapter into its base model, and say what rounding it costs.

    A plain base model is merged an expert at a time; a packed one needs memory for the whole model in bf16.
    """
    need_peft()
    from coterie.adapters.merge import merge_adapter

    done = merge_adapter(adapter, output, model, experts)
    summary = facts(f"{output}: the merged model, experts in {done.format}")
    summary.add_row("experts' parameters", str(done.experts))
    summary.add_row("rounding to the model's dtype", f"{significant(done.rounding_error)} (worst expert)")
    if done.quantisation_error:
        summary.add_row(f"quantising to {done.format}", f"{significant(done.quantisation_error)} (worst expert)")
    console.print(summary)


def need_peft() -> None:
    """Raises ArgumentError where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ArgumentError(f"adapters need {error.name}: pip install 'coterie[train]'") from None
