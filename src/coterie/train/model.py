"""The model of a fine-tuning file: packed experts, an adapter, and what is trained besides it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, load_peft_weights, peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from coterie.checkpoints.folder import read_json
from coterie.errors import ArgumentError
from coterie.hf.loading import from_pretrained
from coterie.hf.weight import PackedWeight
from coterie.train.config import TrainConfig
from coterie.train.precision import keep_float32

ADAPTER = "adapter_config.json"
# What a file says of an adapter, and what adapter_config.json calls it.
LORA_KEYS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "peft_use_rslora": "use_rslora",
}


def load_tokenizer(config: TrainConfig, path: str, folder: Path) -> Any:
    """The tokenizer, with a padding token and the file's chat template."""
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template:
        file = folder / config.chat_template if "{" not in config.chat_template else None
        if file is not None and not file.is_file():
            raise ArgumentError(f"chat_template: expected a Jinja template or a file of one, found no file {file}")
        tokenizer.chat_template = file.read_text(encoding="utf-8") if file else config.chat_template
    return tokenizer


def load_model(config: TrainConfig, path: str, tokenizer: Any) -> Any:
    """The base model with packed experts, frozen but for what the file trains; with an adapter, a PeftModel."""
    auto_class, task = AutoModelForCausalLM, "CAUSAL_LM"
    labels = {}
    if config.reward_model:
        auto_class, task, labels = AutoModelForSequenceClassification, "SEQ_CLS", {"num_labels": 1}
    if config.process_reward_model:
        auto_class, task = AutoModelForTokenClassification, "TOKEN_CLS"
        labels = {"num_labels": config.num_labels or 2}
    model = from_pretrained(
        path,
        config=AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code, **labels),
        experts=config.experts,
        group_size=config.group_size,
        zero_point=config.zero_point or None,
        mmap=config.mmap,
        auto_class=auto_class,
        dtype=torch.bfloat16 if config.bf16 else torch.float32,
        trust_remote_code=config.trust_remote_code,
    )
    model.config.pad_token_id = tokenizer.pad_token_id
    unfrozen = find_unfrozen(model, config.unfrozen_parameters)
    if config.adapter is None:
        model.requires_grad_(False)
        for name in unfrozen:
            model.get_parameter(name).requires_grad_(True)
    elif config.lora_model_dir:
        model = load_adapter(model, config.lora_model_dir, task, unfrozen)
    else:
        model = add_adapter(model, config, task, unfrozen)
    keep_float32(model)
    return model


def reference_model(model: Any) -> Any:
    """The model as it is now, to be compared with while `model` is trained. All that is frozen, packed experts
    included, they share: it takes the memory of the parameters that are trained."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def add_adapter(model: Any, config: TrainConfig, task: str, unfrozen: list[str]) -> Any:
    """The model with a new adapter, the modules of `unfrozen` trained beside it."""
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or None,
        target_parameters=config.lora_target_parameters or None,
        use_rslora=config.peft_use_rslora,
        modules_to_save=sorted(modules_of(unfrozen)) or None,
        task_type=task,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ArgumentError(f"adapter: {error}") from error


def load_adapter(model: Any, path: str, task: str, unfrozen: list[str]) -> Any:
    """The model with an adapter to go on training, for this task, the modules of `unfrozen` trained beside it.

    Raises ArgumentError for one that does not fit.
    """
    lora = PeftConfig.from_pretrained(path)
    lora.task_type, lora.inference_mode = task, False
    lora.modules_to_save = sorted({*(lora.modules_to_save or ()), *modules_of(unfrozen)}) or None
    try:
        model = get_peft_model(model, lora)
        # What is trained beside it and was not before begins as the model has it.
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        beside = {name: tensor for name, tensor in own.items() if "lora_" not in name}
        peft_model.set_peft_model_state_dict(model, {**beside, **load_peft_weights(path, device="cpu")})
        return model
    except (ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()
        raise ArgumentError(f"lora_model_dir: {path} does not fit the model: {' '.join(first[:2])}") from error


def modules_of(parameters: list[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in parameters}


def check_adapter(config: TrainConfig) -> None:
    """Raises ArgumentError where `lora_model_dir` holds no LoRA, or another than the file's own keys describe."""
    if not config.lora_model_dir:
        return
    file = Path(config.lora_model_dir) / ADAPTER
    if not file.is_file():
        raise ArgumentError(f"lora_model_dir: {file.parent} has no {ADAPTER}; expected the folder of an adapter")
    adapter = read_json(file)
    if adapter.get("peft_type") != "LORA":
        raise ArgumentError(f"lora_model_dir: {file.parent} is {adapter.get('peft_type')}; expected a LoRA")
    for key, name in LORA_KEYS.items():
        asked, found = getattr(config, key), adapter.get(name)
        if key in config.given and comparable(asked) != comparable(found):
            raise ArgumentError(
                f"{key}: {asked}, but the adapter in lora_model_dir ({file.parent}) has {found}, and goes on with it: "
                f"leave {key} out, or train a new adapter"
            )


def comparable(value: Any) -> Any:
    """Names in no order, and one nothing for all there are."""
    return (frozenset(value) if isinstance(value, list) else value) or None


def find_unfrozen(model: Any, patterns: list[str]) -> list[str]:
    """The names of the parameters that `patterns` match. Raises ArgumentError for a pattern that matches none."""
    names: dict[str, None] = {}
    for pattern in patterns:
        try:
            matched = [(name, p) for name, p in model.named_parameters() if re.search(pattern, name)]
        except re.error as error:
            raise ArgumentError(f"unfrozen_parameters: {pattern!r} is not a regular expression: {error}") from None
        if not matched:
            raise ArgumentError(f"unfrozen_parameters: {pattern!r} matches no parameter of {type(model).__name__}")
        packed = next((name for name, p in matched if isinstance(p, PackedWeight)), None)
        if packed:
            raise ArgumentError(
                f"unfrozen_parameters: {pattern!r} matches {packed}, whose packed weights are frozen; "
                "train experts through lora_target_parameters"
            )
        names |= dict.fromkeys(name for name, _ in matched)
    return list(names)
