"""A fine-tuning file's settings as the arguments of the trainer that they are for."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments
from trl import DPOConfig, RewardConfig, SFTConfig

from coterie.errors import ArgumentError
from coterie.recompute import checkpointing
from coterie.train.config import TrainConfig


def make_arguments(config: TrainConfig, has_test: bool) -> TrainingArguments:
    """The arguments of that trainer. Raises ArgumentError for settings that it refuses."""
    try:
        made = _arguments(config, has_test)
    except ValueError as error:
        raise ArgumentError(f"the trainer refuses these settings: {error}") from error
    if made.device.type == "cuda":
        made._n_gpu = 1  # of several that there may be: a process trains on one
    return made


def _arguments(config: TrainConfig, has_test: bool) -> TrainingArguments:
    common = arguments(config, has_test)
    if config.process_reward_model:
        return TrainingArguments(**common)
    common |= {"max_length": config.sequence_len, "dataset_num_proc": config.dataset_processes}
    if config.reward_model:
        return RewardConfig(**common)
    if config.router_aux_loss_coef is not None:
        common["router_aux_loss_coef"] = config.router_aux_loss_coef
    if config.rl == "dpo":
        return DPOConfig(beta=config.rl_beta, **common)
    # An evaluation is not packed: a row is a row, to be counted once.
    return SFTConfig(packing=config.sample_packing, eval_packing=False, **common)


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
        "report_to": config.report_to,
        "run_name": config.wandb_name,
        "use_cpu": config.device == "cpu",
        "bf16": False,
    }
