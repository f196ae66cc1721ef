"""The keys of a fine-tuning file, in axolotl's vocabulary where it has a word, and the check of what a file says."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from coterie.errors import ArgumentError
from coterie.train.axolotl import translate, translate_entry

EXPERT_PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS = ("lora", "qlora")
OBJECTIVES = ("dpo",)
TYPES = ("chat_template", "prompt_completion", "alpaca", "completion", "preference", "stepwise")
ALL_LINEAR = "all-linear"
DEVICES = ("cpu", "cuda")


def key(default: Any, about: str) -> Any:
    """A key with its default and what it means; `coterie sft --init` writes both."""
    return field(default=default, metadata={"about": about})


@dataclass
class DatasetConfig:
    """One entry of `datasets` or `test_datasets`."""

    path: str = key("", "a .jsonl, .json, .csv, .parquet or .txt file, or a Hugging Face id")
    type: str | None = key(None, f"{', '.join(TYPES)}; by default told from the columns")
    split: str = key("train", "the split of a Hugging Face data set")
    name: str | None = key(None, "the configuration of a Hugging Face data set")
    field_messages: str = key("messages", "chat_template: the column of messages; without it, conversations")
    message_field_role: str | None = key(None, "chat_template: who speaks; by default role, or from")
    message_field_content: str | None = key(None, "chat_template: what is said; by default content, or value")
    field: str = key("text", "completion: the column of text")


@dataclass
class TrainConfig:
    """A whole fine-tuning file."""

    given = frozenset[str]()  # the keys that the file says; the others have their defaults

    base_model: str = key("", "a checkpoint folder (plain, quantised or packed), a GGUF file, or a Hugging Face id")
    experts: str | None = key(None, "bf16, int8, int4, fp8_block ...; by default int4, or what the checkpoint is in")
    group_size: int | None = key(None, "columns that share a scale: 32, 64, 128, or 0 for a whole row")
    zero_point: bool = key(False, "int4 with zero points")
    mmap: bool = key(False, "use a packed checkpoint's experts where they lie on disk; processes then share one copy")
    device: str = key("cpu", "where all but the experts is: cpu, or cuda, the GPU (under torchrun, each process's own)")
    gpu_experts: str | int | float | None = key(
        None,
        "experts that are on the GPU too: all, a number of each layer's, or a fraction in (0, 1]; or stream: in "
        "RAM, and sent there wherever that is faster",
    )
    bf16: bool = key(True, "the rest of the model in bfloat16; false: float32")
    trust_remote_code: bool = key(False, "allow code from the model's repository")
    chat_template: str | None = key(None, "chatml, a Jinja template or a file of one; by default the tokenizer's")

    datasets: list[DatasetConfig] = field(default_factory=list, metadata={"about": "what to train on"})
    test_datasets: list[DatasetConfig] = field(default_factory=list, metadata={"about": "what to evaluate on"})
    val_set_size: float = key(0.0, "what to hold out of `datasets`: a share below 1, or a number of rows")
    dataset_processes: int | None = key(None, "processes that tokenise")
    sequence_len: int = key(1024, "tokens of a sample; longer ones are cut")
    sample_packing: bool = key(False, "several samples in one sequence of sequence_len")
    train_on_inputs: bool = key(False, "chat: learn the user's words too, not the assistant's alone")

    rl: str | None = key(None, "dpo, on preference data; by default supervised fine-tuning")
    rl_beta: float = key(0.1, "dpo: how near to the reference to stay")
    reward_model: bool = key(False, "train a reward model on preference data")
    process_reward_model: bool = key(False, "train a reward model of single steps on stepwise data")
    num_labels: int | None = key(None, "reward models: labels; 1 for a reward model, 2 for a process reward model")

    adapter: str | None = key(None, "lora or qlora; without one only unfrozen_parameters are trained")
    lora_r: int = key(16, "rank")
    lora_alpha: int = key(32, "scaling times rank (times its root with peft_use_rslora)")
    lora_dropout: float = key(0.0, "must be 0 where experts are adapted")
    lora_target_modules: list[str] | str = field(
        default_factory=ATTENTION.copy, metadata={"about": "linear layers to adapt; all-linear: all of them"}
    )
    lora_target_parameters: list[str] = field(
        default_factory=EXPERT_PARAMETERS.copy, metadata={"about": "experts' parameters to adapt"}
    )
    lora_model_dir: str | None = key(None, "an adapter to go on from")
    peft_use_rslora: bool = key(False, "rank-stabilised scaling")
    unfrozen_parameters: list[str] = field(
        default_factory=list,
        metadata={"about": "regular expressions of parameters to train in full, in float32"},
    )

    micro_batch_size: int = key(1, "samples (packed sequences) of a forward pass")
    eval_batch_size: int | None = key(None, "the same in evaluation")
    gradient_accumulation_steps: int = key(1, "forward passes of a step")
    num_epochs: float = key(1.0, "passes over the data")
    max_steps: int = key(-1, "stop after so many steps; -1: num_epochs decides")
    learning_rate: float = key(2e-4, "its highest value")
    optimizer: str = key("adamw_torch", "any optimizer of Transformers' Trainer")
    lr_scheduler: str = key("cosine", "any schedule of Transformers' Trainer")
    warmup_steps: int = key(0, "steps until the highest learning rate")
    warmup_ratio: float = key(0.0, "the same as a share of all steps")
    weight_decay: float = key(0.0, "AdamW's weight decay")
    max_grad_norm: float = key(1.0, "gradients are scaled down to this norm")
    router_aux_loss_coef: float | None = key(None, "weight of the router's balancing loss; by default the model's")
    gradient_checkpointing: bool | str = key(
        False, "recompute activations: true, or retain_experts to recompute all but the experts"
    )
    seed: int = key(42, "of initialisation and shuffling")

    report_to: list[str] = field(
        default_factory=list, metadata={"about": "where metrics go besides output_dir: wandb, tensorboard, mlflow ..."}
    )
    wandb_project: str | None = key(None, "the project in Weights & Biases; report_to then has wandb")
    wandb_entity: str | None = key(None, "whose project it is")
    wandb_name: str | None = key(None, "the run's name there")

    output_dir: str = key("", "where the adapter, metrics.jsonl, loss.png and checkpoints go")
    logging_steps: int = key(1, "a line of metrics every so many steps")
    eval_steps: int | None = key(None, "evaluate every so many steps; by default after every epoch")
    save_steps: int | None = key(None, "a checkpoint every so many steps; by default after every epoch")
    save_total_limit: int | None = key(None, "keep so many checkpoints")
    resume_from_checkpoint: str | None = key(None, "go on from this checkpoint folder")
    auto_resume_from_checkpoints: bool = key(False, "go on from the last checkpoint of output_dir, if there is one")
    profiler_steps: int | None = key(None, "write a Chrome trace of so many steps")
    profiler_steps_start: int = key(1, "the step before which the profiler starts")


def read_config(path: Path) -> TrainConfig:
    """The file's settings, checked. Raises ArgumentError naming the file, the key, what was expected and found."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArgumentError(f"cannot read {path}: {error.strerror}; `coterie sft --init` writes an example") from None
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{path}: expected UTF-8 text ({error})") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArgumentError(f"{path} is not YAML: {error}") from None
    if not isinstance(values, dict):
        raise ArgumentError(f"{path}: expected `key: value` lines, found {type(values).__name__}")
    values = translate(values, str(path))
    config = build(TrainConfig, values, str(path))
    config.given = frozenset(name for name, value in values.items() if value is not None)
    check(config, str(path))
    return config


def build(kind: type, values: dict, where: str) -> Any:
    """An instance of a dataclass of keys from a mapping; keys that are null keep their defaults."""
    hints = typing.get_type_hints(kind)
    given = {}
    if kind is DatasetConfig:
        values = translate_entry(values, where)
    for name, value in values.items():
        if name not in hints:
            near = difflib.get_close_matches(str(name), hints, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "`coterie sft --init FILE` writes all there are"
            raise ArgumentError(f"{where}: unknown key {name!r}; {hint}")
        if value is not None:
            given[name] = convert(hints[name], value, f"{where}: {name}")
    return kind(**given)


def convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type `hint` says. Raises ArgumentError."""
    choices = [h for h in typing.get_args(hint) if h is not type(None)] if is_union(hint) else [hint]
    for choice in choices:
        if typing.get_origin(choice) is list:
            (element,) = typing.get_args(choice)
            if not isinstance(value, list):
                continue
            return [convert(element, v, f"{where}[{i}]") for i, v in enumerate(value)]
        if dataclasses.is_dataclass(choice) and isinstance(value, dict):
            return build(choice, value, where)
        if choice is float and not isinstance(value, bool):
            try:  # YAML reads 2e-4 as text
                return float(value)
            except (TypeError, ValueError):
                continue
        if type(value) is choice:
            return value
    raise ArgumentError(f"{where}: expected {' or '.join(map(describe, choices))}, found {value!r}")


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def describe(choice: Any) -> str:
    """A type in a user's words."""
    if typing.get_origin(choice) is list:
        return f"a list, each {describe(typing.get_args(choice)[0])}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(choice, "a mapping of keys")


def trains_supervised(config: TrainConfig) -> bool:
    """Whether the file asks for supervised fine-tuning: no preferences, no reward model."""
    return not (config.rl or config.reward_model or config.process_reward_model)


def check(config: TrainConfig, where: str) -> None:
    """Raises ArgumentError for keys that are missing, out of range, or do not fit together."""

    def refuse(problem: str) -> None:
        raise ArgumentError(f"{where}: {problem}")

    for name in ("base_model", "datasets", "output_dir"):
        if not getattr(config, name):
            refuse(f"{name} is missing")
    for name in ("lora_r", "sequence_len", "micro_batch_size", "gradient_accumulation_steps", "logging_steps"):
        if getattr(config, name) < 1:
            refuse(f"{name}: expected at least 1, found {getattr(config, name)}")
    for name in ("learning_rate", "num_epochs"):
        if not getattr(config, name) > 0:
            refuse(f"{name}: expected more than 0, found {getattr(config, name)}")
    choices = {"adapter": ADAPTERS, "rl": OBJECTIVES, "device": DEVICES}
    for name, expected in choices.items():
        if getattr(config, name) not in (None, *expected):
            refuse(f"{name}: expected {' or '.join(expected)}, found {getattr(config, name)!r}")
    if isinstance(config.gpu_experts, str) and config.gpu_experts.partition(":")[0] not in ("all", "stream"):
        refuse(
            "gpu_experts: expected all, stream, a number of each layer's experts or a fraction in (0, 1], found "
            f"{config.gpu_experts!r}"
        )
    if config.gpu_experts is not None and config.device == "cpu":
        refuse("gpu_experts: experts are on the GPU that the rest of the model is on: add device: cuda")
    if config.gradient_checkpointing not in (True, False, "retain_experts"):
        found = config.gradient_checkpointing
        refuse(f"gradient_checkpointing: expected true, false or retain_experts, found {found!r}")
    for name in ("datasets", "test_datasets"):
        for i, dataset in enumerate(getattr(config, name)):
            if not dataset.path:
                refuse(f"{name}[{i}]: path is missing")
            if dataset.type not in (None, *TYPES):
                refuse(f"{name}[{i}]: type: expected {', '.join(TYPES)}, found {dataset.type!r}")
    if sum([config.rl is not None, config.reward_model, config.process_reward_model]) > 1:
        refuse("rl, reward_model and process_reward_model exclude each other")
    if config.adapter is None and not config.unfrozen_parameters:
        refuse("nothing to train: give adapter: lora, or unfrozen_parameters (packed experts are trained through LoRA)")
    if config.lora_model_dir and config.adapter is None:
        refuse("lora_model_dir is an adapter to go on training: add adapter: lora, or leave it out")
    if config.adapter == "qlora" and config.experts not in (None, "int4"):
        refuse(f"adapter: qlora is LoRA on int4 experts, found experts: {config.experts}; use adapter: lora")
    if config.lora_dropout and config.adapter and config.lora_target_parameters:
        refuse("lora_dropout: expected 0 where experts are adapted (lora_target_parameters)")
    if config.reward_model and config.num_labels not in (None, 1):
        refuse(f"num_labels: expected 1 for a reward model, found {config.num_labels}")
    if isinstance(config.lora_target_modules, str) and config.lora_target_modules != ALL_LINEAR:
        refuse(f"lora_target_modules: expected a list or {ALL_LINEAR}, found {config.lora_target_modules!r}")
    if config.sample_packing and not trains_supervised(config):
        refuse("sample_packing is for supervised fine-tuning only")
    if config.val_set_size < 0:
        refuse(f"val_set_size: expected 0 or more, found {config.val_set_size}")
    if config.resume_from_checkpoint and config.auto_resume_from_checkpoints:
        refuse("resume_from_checkpoint and auto_resume_from_checkpoints exclude each other")
