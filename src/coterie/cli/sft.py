"""coterie sft: fine-tune a model from one YAML file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.console import console, count, errors, facts, significant
from coterie.errors import ArgumentError


def sft(
    config: Annotated[Path, typer.Argument(help="The YAML file; see --init.")],
    init: Annotated[bool, typer.Option("--init", help="Write a commented example to CONFIG, and stop.")] = False,
    validate: Annotated[bool, typer.Option("--validate", help="Check CONFIG and its data, and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint of output_dir.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Take away an earlier run of output_dir.")] = False,
) -> None:
    """Fine-tune a model with packed experts through LoRA: supervised, DPO, or a reward model.

    Writes the adapter (PEFT's format), metrics.jsonl and loss.png to the file's output_dir. The keys are axolotl's
    where it has them. Ctrl-C finishes the step at hand and writes a checkpoint; Ctrl-C again stops at once.
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
    if resume and (overwrite or settings.resume_from_checkpoint):
        raise ArgumentError(f"--resume excludes {'--overwrite' if overwrite else 'resume_from_checkpoint'}")
    settings.auto_resume_from_checkpoints |= resume
    from coterie.train import run
    from coterie.train.checks import check_all
    from coterie.train.metrics import shown
    from coterie.train.processes import end_process_group

    if validate:
        checked = check_all(settings, config.parent, overwrite)
        for line in checked.findings:
            console.print(line, highlight=False, soft_wrap=True)
        rows, held = len(checked.train), len(checked.test) if checked.test else 0
        console.print(f"{config} is fine: {rows} rows to train on, {held} to evaluate on", highlight=False)
        return
    report = run.train(settings, config.parent, errors, overwrite)
    end_process_group()
    if report is None:
        return
    if report.signal:
        again = f"coterie sft {shlex.quote(str(config))} --resume"
        line = f"stopped after step {report.steps} of {report.planned}, which is saved; to go on: {again}"
        errors.print(line, highlight=False, soft_wrap=True, markup=False)
        raise typer.Exit(128 + report.signal)
    summary = facts(str(config))
    summary.add_row("trained", f"{count(report.trained)} parameters, {report.steps} steps")
    summary.add_row("time", f"{significant(report.seconds)} s")
    summary.add_row("first step", shown(report.losses[0]))
    summary.add_row("last step", shown(report.losses[-1]))
    if report.eval_losses:
        summary.add_row("evaluation", f"loss {report.eval_losses[-1]:.4f}")
    summary.add_row("saved", str(report.output_dir))
    console.print(summary)
