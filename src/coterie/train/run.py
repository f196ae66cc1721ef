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
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from coterie.errors import ArgumentError, CheckpointError
from coterie.hf.loading import check_folder
from coterie.recompute import checkpointing
from coterie.train.callbacks import CURVE, METRICS, MetricsFile, Profiler, ProgressBar, draw_losses, read_metrics
from coterie.train.config import TrainConfig
from coterie.train.data import load_datasets, locate
from coterie.train.model import load_model, load_tokenizer
from coterie.train.resume import find_checkpoint
from coterie.train.steps import step_trainer


@dataclass(frozen=True)
class Report:
    """What a run did."""

    steps: int
    seconds: float
    first_loss: float
    last_loss: float
    eval_loss: float | None
    trained: int
    output_dir: Path


def validate(config: TrainConfig, folder: Path) -> tuple[int, int]:
    """(rows to train on, rows to evaluate on), with everything checked that can be without loading the model.

    Raises ArgumentError or CheckpointError.
    """
    model = Path(base_model(config, folder))
    if model.is_dir():
        check_folder(model)
    check_output(Path(config.output_dir))
    find_checkpoint(config)
    train, test = load_datasets(config, folder)
    return len(train), len(test) if test is not None else 0


def check_output(folder: Path) -> None:
    """Raises CheckpointError where `folder` cannot be written or made; writes nothing."""
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise CheckpointError(f"output_dir: {folder} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"output_dir: {folder} cannot be written: {parent} is read-only; name another folder")


def base_model(config: TrainConfig, folder: Path) -> str:
    """The model's folder, or its Hugging Face id."""
    found = locate(config.base_model, folder)
    return str(found) if found else config.base_model


def train(config: TrainConfig, folder: Path, console: Console) -> Report | None:
    """Runs a checked file; relative paths are seen from `folder`. Writes everything under `config.output_dir`.

    Under torchrun each process trains on its share of every step; the first one alone prints, writes and reports, the
    others return None.
    """
    logging.set_verbosity_error()
    if os.environ.get("RANK", "0") != "0":
        logging.disable_progress_bar()
    check_output(Path(config.output_dir))
    resume = find_checkpoint(config)
    train_rows, test_rows = load_datasets(config, folder)
    path = base_model(config, folder)
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
    if is_first:
        trainer.add_callback(MetricsFile(output / METRICS))
        trainer.add_callback(ProgressBar(console))
        if config.profiler_steps:
            trainer.add_callback(Profiler(output, config.profiler_steps, config.profiler_steps_start))
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds = time.perf_counter() - start
    trainer.save_model(str(output))
    if not is_first:
        return None
    metrics = read_metrics(output / METRICS)
    draw_losses(metrics, output / CURVE)
    losses = [row["loss"] for row in metrics if "loss" in row]
    evaluated = [row["eval_loss"] for row in metrics if "eval_loss" in row]
    return Report(
        steps=trainer.state.global_step,
        seconds=seconds,
        first_loss=losses[0],
        last_loss=losses[-1],
        eval_loss=evaluated[-1] if evaluated else None,
        trained=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        output_dir=output,
    )


def make_trainer(config: TrainConfig, **given: Any) -> Any:
    """The trainer of what the file trains."""
    common = arguments(config, has_test=given["eval_dataset"] is not None)
    if config.process_reward_model:
        args = TrainingArguments(**common)
        return step_trainer(args=args, max_length=config.sequence_len, processes=config.dataset_processes, **given)
    common |= {"max_length": config.sequence_len, "dataset_num_proc": config.dataset_processes}
    if config.reward_model:
        return RewardTrainer(args=RewardConfig(**common), **given)
    if config.router_aux_loss_coef is not None:
        common["router_aux_loss_coef"] = config.router_aux_loss_coef
    if config.rl == "dpo":
        return DPOTrainer(args=DPOConfig(beta=config.rl_beta, **common), **given)
    chats = "messages" in given["train_dataset"].column_names
    args = SFTConfig(packing=config.sample_packing, assistant_only_loss=chats and not config.train_on_inputs, **common)
    return SFTTrainer(args=args, **given)


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
