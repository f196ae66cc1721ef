"""coterie sft: fine-tune a model from one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.console import console, count, errors, facts, significant
from coterie.errors import ArgumentError


def sft(
    config: Annotated[Path, typer.Argument(help="The YAML file; see --init.")],
    init: Annotated[bool, typer.Option("--init", help="Write a commented example to CONFIG, and stop.")] = False,
    validate: Annotated[bool, typer.Option("--validate", help="Check CONFIG and its data, and stop.")] = False,
) -> None:
    """Fine-tune a model with packed experts through LoRA: supervised, DPO, or a reward model.

    Writes the adapter (PEFT's format), metrics.jsonl and loss.png to the file's output_dir. The keys are axolotl's
    where it has them.
    """
    try:
        import datasets
        import peft  # noqa: F401
        import trl  # noqa: F401
        import yaml  # noqa: F401
    except ImportError as error:
        raise ArgumentError(f"fine-tuning needs {error.name}: pip install 'coterie[train]'") from None
    from coterie.train.example import write_example

    datasets.disable_progress_bars()
    if init:
        write_example(config)
        console.print(f"{config}: runs as it is, with [bold]coterie sft {config}[/]", highlight=False)
        return
    from coterie.train.config import read_config

    settings = read_config(config)
    from coterie.train import run
    from coterie.train.processes import end_process_group

    if validate:
        rows, held = run.validate(settings, config.parent)
        console.print(f"{config} is fine: {rows} rows to train on, {held} to evaluate on", highlight=False)
        return
    report = run.train(settings, config.parent, errors)
    end_process_group()
    if report is None:
        return
    summary = facts(str(config))
    summary.add_row("trained", f"{count(report.trained)} parameters, {report.steps} steps")
    summary.add_row("time", f"{significant(report.seconds)} s")
    summary.add_row("loss", f"{report.first_loss:.4f} -> {report.last_loss:.4f}")
    if report.eval_loss is not None:
        summary.add_row("evaluation loss", f"{report.eval_loss:.4f}")
    summary.add_row("saved", str(report.output_dir))
    console.print(summary)
