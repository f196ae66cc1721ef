"""One fine-tuning run: data, model and trainer put together, trained, and saved."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import DataCollatorForTokenClassification, logging, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from coterie.adapters.card import write_card
from coterie.errors import ArgumentError
from coterie.train.arguments import make_arguments
from coterie.train.callbacks import Profiler, ProgressBar
from coterie.train.checks import Checked, check_all
from coterie.train.config import TrainConfig
from coterie.train.curve import draw_losses
from coterie.train.data.load import locate
from coterie.train.metrics import METRICS, MetricsFile, Row, read_metrics
from coterie.train.model import load_model, reference_model
from coterie.train.output import CURVE, clear
from coterie.train.packing import refuse_mixing
from coterie.train.processes import is_alone
from coterie.train.stop import HOUR, Stop
from coterie.train.trainers import Preferences, Rewards, Steps, Supervised


@dataclass(frozen=True)
class Report:
    """What a run did. A run that a signal ended early has left a checkpoint and no adapter of its own.

    losses: its logs that have one.
    """

    steps: int
    planned: int
    seconds: float
    losses: list[Row]
    eval_losses: list[float]
    trained: int
    output_dir: Path
    signal: int | None = None

    @property
    def first_loss(self) -> float:
        return self.losses[0]["loss"]

    @property
    def last_loss(self) -> float:
        return self.losses[-1]["loss"]


def train(config: TrainConfig, folder: Path, console: Console, overwrite: bool = False) -> Report | None:
    """Runs a file once it is checked; relative paths are seen from `folder`. Writes all under `config.output_dir`.

    overwrite: what an earlier run left there is taken away before the first step.
    Under torchrun each process trains on its share of every step; the first one alone prints, writes and reports, the
    others return None.
    """
    is_first = os.environ.get("RANK", "0") == "0"
    logging.set_verbosity_error()
    if not is_first:
        logging.disable_progress_bar()
        console = Console(quiet=True)
    checked = check_all(config, folder, overwrite)
    for line in checked.findings:
        console.print(line, highlight=False, soft_wrap=True)

    trainer = load_trainer(config, checked)
    stop = Stop(console, every=None if config.save_steps else HOUR)
    trainer.add_callback(stop)
    output = Path(config.output_dir)
    if is_first:
        for callback in watchers(config, output, console):
            trainer.add_callback(callback)
        if overwrite:
            clear(output, checked.resume)

    start = time.perf_counter()
    with stop.listening():
        trainer.train(resume_from_checkpoint=str(checked.resume) if checked.resume else None)
    seconds = time.perf_counter() - start

    if not stop.stopping:
        trainer.save_model(str(output))
    if not is_first:
        return None
    metrics = read_metrics(output / METRICS)
    if not stop.stopping:
        write_card(output, checked.base, [str(locate(entry.path, folder) or entry.path) for entry in config.datasets])
        experts = trainer.model.config.quantization_config.packing.name
        draw_losses(metrics, output / CURVE, f"{Path(checked.base).name}, experts in {experts}", unit(config))
    return Report(
        steps=trainer.state.global_step,
        planned=trainer.state.max_steps,
        seconds=seconds,
        losses=[row for row in metrics if "loss" in row],
        eval_losses=[row["eval_loss"] for row in metrics if "eval_loss" in row],
        trained=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        output_dir=output,
        signal=stop.signal if stop.stopping else None,
    )


def load_trainer(config: TrainConfig, checked: Checked) -> Any:
    """The model with packed experts in its trainer, which shows nothing yet.

    Adapters of experts stay in RAM, as experts there do. Where experts are on a GPU they are there too, and where
    several processes train, whose gradients travel from one device.
    """
    for name, value in (("WANDB_PROJECT", config.wandb_project), ("WANDB_ENTITY", config.wandb_entity)):
        if value:
            os.environ[name] = value
    set_seed(config.seed)
    model = load_model(config, checked.base, checked.tokenizer)
    if not checked.packing_tried:
        refuse_mixing(model)
    trainer = make_trainer(
        config,
        model=model,
        train_dataset=checked.train,
        eval_dataset=checked.test,
        processing_class=checked.tokenizer,
    )
    if config.gpu_experts is not None or not is_alone():
        trainer.model.to(trainer.args.device)
    trainer.remove_callback(PrinterCallback)
    return trainer


def watchers(config: TrainConfig, output: Path, console: Console) -> list[TrainerCallback]:
    """What shows and records the run."""
    found: list[TrainerCallback] = [MetricsFile(output / METRICS), ProgressBar(console)]
    if config.profiler_steps:
        found.append(Profiler(output, config.profiler_steps, config.profiler_steps_start))
    return found


def unit(config: TrainConfig) -> str:
    """What a loss is the mean of."""
    if config.process_reward_model:
        return "step"
    return "pair" if config.rl or config.reward_model else "token"


def make_trainer(config: TrainConfig, **given: Any) -> Any:
    """The trainer of what the file trains. Raises ArgumentError for settings that it refuses."""
    args = make_arguments(config, has_test=given["eval_dataset"] is not None)
    args.use_cache = getattr(given["model"].config, "use_cache", True)  # as it is to be saved
    try:
        if config.process_reward_model:
            collator = DataCollatorForTokenClassification(given["processing_class"])
            return Steps(args=args, data_collator=collator, **given)
        if config.reward_model:
            return Rewards(args=args, **given)
        if config.rl == "dpo":
            reference = reference_model(given["model"]) if config.adapter is None else None
            return Preferences(args=args, ref_model=reference, **given)
        return Supervised(args=args, **given)
    except ValueError as error:
        raise ArgumentError(f"the trainer refuses these settings: {error}") from error
