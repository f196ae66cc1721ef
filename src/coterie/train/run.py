"""One fine-tuning run: data, model and trainer put together, trained, and saved."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainingArguments, logging, set_seed
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, RewardConfig, SFTConfig

from coterie.adapters.card import write_card
from coterie.errors import ArgumentError
from coterie.hf.loading import check_folder
from coterie.recompute import checkpointing
from coterie.train.callbacks import Profiler, ProgressBar
from coterie.train.config import TrainConfig
from coterie.train.curve import draw_losses
from coterie.train.data import load_datasets, locate
from coterie.train.metrics import METRICS, MetricsFile, Row, read_metrics
from coterie.train.model import check_adapter, load_model, load_tokenizer, reference_model
from coterie.train.output import CURVE, clear, plan_output
from coterie.train.steps import step_trainer
from coterie.train.stop import HOUR, Stop
from coterie.train.trainers import Preferences, Rewards, Supervised


@dataclass(frozen=True)
class Report:
    """What a run did. A run that a signal ended early has left a checkpoint and no adapter of its own."""

    steps: int
    planned: int
    seconds: float
    first: Row
    last: Row
    eval_loss: float | None
    trained: int
    output_dir: Path
    signal: int | None = None

    @property
    def first_loss(self) -> float:
        return self.first["loss"]

    @property
    def last_loss(self) -> float:
        return self.last["loss"]


def validate(config: TrainConfig, folder: Path, overwrite: bool = False) -> tuple[int, int]:
    """(rows to train on, rows to evaluate on), with everything checked that can be without loading the model.

    Raises ArgumentError or CheckpointError.
    """
    path = base_model(config, folder)
    if Path(path).is_dir():
        check_folder(Path(path))
    plan_output(config, path, overwrite)
    check_adapter(config)
    train, test = load_datasets(config, folder)
    return len(train), len(test) if test is not None else 0


def base_model(config: TrainConfig, folder: Path) -> str:
    """The model's folder, or its Hugging Face id."""
    found = locate(config.base_model, folder)
    return str(found) if found else config.base_model


def train(config: TrainConfig, folder: Path, console: Console, overwrite: bool = False) -> Report | None:
    """Runs a checked file; relative paths are seen from `folder`. Writes everything under `config.output_dir`.

    overwrite: what an earlier run left there is taken away before the first step.
    Under torchrun each process trains on its share of every step; the first one alone prints, writes and reports, the
    others return None.
    """
    logging.set_verbosity_error()
    if os.environ.get("RANK", "0") != "0":
        logging.disable_progress_bar()
    path = base_model(config, folder)
    resume = plan_output(config, path, overwrite)
    check_adapter(config)
    train_rows, test_rows = load_datasets(config, folder)
    set_seed(config.seed)
    tokenizer = load_tokenizer(config, path, folder)
    model = load_model(config, path, tokenizer)
    output = Path(config.output_dir)
    try:
        trainer = make_trainer(
            config,
            model=model,
            train_dataset=train_rows,
            eval_dataset=test_rows,
            processing_class=tokenizer,
        )
    except ValueError as error:
        raise ArgumentError(f"the trainer refuses these settings: {error}") from error
    trainer.remove_callback(PrinterCallback)
    is_first = trainer.is_world_process_zero()
    stop = Stop(console if is_first else Console(quiet=True), every=None if config.save_steps else HOUR)
    trainer.add_callback(stop)
    if is_first:
        trainer.add_callback(MetricsFile(output / METRICS))
        trainer.add_callback(ProgressBar(console))
        if config.profiler_steps:
            trainer.add_callback(Profiler(output, config.profiler_steps, config.profiler_steps_start))
        if overwrite:
            clear(output, resume)
    start = time.perf_counter()
    with stop.listening():
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = time.perf_counter() - start
    if not stop.stopping:
        trainer.save_model(str(output))
    if not is_first:
        return None
    metrics = read_metrics(output / METRICS)
    if not stop.stopping:
        write_card(output, path, [str(locate(entry.path, folder) or entry.path) for entry in config.datasets])
        experts = model.config.quantization_config.experts
        draw_losses(metrics, output / CURVE, f"{Path(path).name}, experts in {experts}", unit(config))
    losses = [row for row in metrics if "loss" in row]
    evaluated = [row["eval_loss"] for row in metrics if "eval_loss" in row]
    return Report(
        steps=trainer.state.global_step,
        planned=trainer.state.max_steps,
        seconds=seconds,
        first=losses[0],
        last=losses[-1],
        eval_loss=evaluated[-1] if evaluated else None,
        trained=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        output_dir=output,
        signal=stop.signal if stop.stopping else None,
    )


def unit(config: TrainConfig) -> str:
    """What a loss is the mean of."""
    if config.process_reward_model:
        return "step"
    return "pair" if config.rl or config.reward_model else "token"


def make_trainer(config: TrainConfig, **given: Any) -> Any:
    """The trainer of what the file trains."""
    common = arguments(config, has_test=given["eval_dataset"] is not None)
    common["use_cache"] = getattr(given["model"].config, "use_cache", True)  # as it is to be saved
    if config.process_reward_model:
        args = TrainingArguments(**common)
        return step_trainer(args=args, max_length=config.sequence_len, processes=config.dataset_processes, **given)
    common |= {"max_length": config.sequence_len, "dataset_num_proc": config.dataset_processes}
    if config.reward_model:
        return Rewards(args=RewardConfig(**common), **given)
    if config.router_aux_loss_coef is not None:
        common["router_aux_loss_coef"] = config.router_aux_loss_coef
    if config.rl == "dpo":
        reference = reference_model(given["model"]) if config.adapter is None else None
        return Preferences(args=DPOConfig(beta=config.rl_beta, **common), ref_model=reference, **given)
    chats = "messages" in given["train_dataset"].column_names
    args = SFTConfig(
        packing=config.sample_packing,
        eval_packing=False,  # so that a row is a row, to be counted once
        assistant_only_loss=chats and not config.train_on_inputs,
        **common,
    )
    return Supervised(args=args, **given)


def arguments(config: TrainConfig, has_test: bool) -> dict[str, Any]:
    """What Transformers' TrainingArguments say, whatever is trained."""
    retain = config.gradient_checkpointing == "retain_experts"
    return {
        "output_dir": config.output_dir,
        "per_device_train_batch_size": config.micro_batch_size,
        "per_device_eval_batch_size": config.eval_batch_size or config.micro_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.num_epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "optim": config.optimizer,
        "lr_scheduler_type": config.lr_scheduler,
        "warmup_steps": config.warmup_steps or config.warmup_ratio,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": bool(config.gradient_checkpointing),
        "gradient_checkpointing_kwargs": checkpointing(retain) if config.gradient_checkpointing else None,
        "seed": config.seed,
        "logging_first_step": True,
        "logging_steps": config.logging_steps,
        "eval_strategy": ("steps" if config.eval_steps else "epoch") if has_test else "no",
        "eval_steps": config.eval_steps,
        "save_strategy": "steps" if config.save_steps else "epoch",
        "save_steps": config.save_steps or 500,
        "save_total_limit": config.save_total_limit,
        "disable_tqdm": True,
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
    }
