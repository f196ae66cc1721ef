"""The model of a fine-tuning file: packed experts, an adapter, and what is trained besides it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from coterie.checkpoints.packed_formats import OWN
from coterie.errors import ArgumentError, CheckpointError
from coterie.hf import described
from coterie.hf.loading import from_pretrained
from coterie.hf.weight import PackedWeight
from coterie.train.adapter import add_adapter, load_adapter
from coterie.train.config import TrainConfig
from coterie.train.data.template import set_template
from coterie.train.precision import keep_float32
from coterie.train.processes import own_device


def load_tokenizer(config: TrainConfig, path: str, folder: Path) -> Any:
    """The tokenizer, with a padding token and the file's chat template. Raises CheckpointError where there is none."""
    try:
        tokenizer = described.load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # tokenizers fail in as many ways as there are kinds
        first = next(iter(str(error).strip().splitlines()), "")
        raise CheckpointError(f"the tokenizer of {path} cannot be loaded: {type(error).__name__}: {first}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    set_template(tokenizer, config.chat_template, folder)
    return tokenizer


def kind_of_model(config: TrainConfig) -> tuple[Any, str, dict[str, int]]:
    """(the auto class, PEFT's task type, changes to the model's config) of what the file trains."""
    if config.reward_model:
        return AutoModelForSequenceClassification, "SEQ_CLS", {"num_labels": 1}
    if config.process_reward_model:
        return AutoModelForTokenClassification, "TOKEN_CLS", {"num_labels": config.num_labels or 2}
    return AutoModelForCausalLM, "CAUSAL_LM", {}


def load_model(config: TrainConfig, path: str, tokenizer: Any) -> Any:
    """The base model with packed experts, frozen but for what the file trains; with an adapter, a PeftModel.

    Adapters of experts are in RAM, whatever the device is.
    """
    auto_class, task, labels = kind_of_model(config)
    model = from_pretrained(
        path,
        config=described.load_config(path, trust_remote_code=config.trust_remote_code, **labels),
        experts=config.experts,
        group_size=config.group_size,
        zero_point=config.zero_point or None,
        mmap=config.mmap,
        device=own_device(config.device),
        gpu_experts=config.gpu_experts,
        dense=None if config.unfrozen_parameters else OWN,
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


def find_unfrozen(model: Any, patterns: list[str], experts: tuple[str, ...] = ()) -> list[str]:
    """The names of the parameters that `patterns` match. Raises ArgumentError for a pattern that matches none.

    experts: the names of the experts' parameters where they are not packed yet.
    """
    names: dict[str, None] = {}
    for pattern in patterns:
        try:
            matched = [(name, p) for name, p in model.named_parameters() if re.search(pattern, name)]
        except re.error as error:
            raise ArgumentError(f"unfrozen_parameters: {pattern!r} is not a regular expression: {error}") from None
        if not matched:
            raise ArgumentError(f"unfrozen_parameters: {pattern!r} matches no parameter of {type(model).__name__}")
        packed = next((name for name, p in matched if isinstance(p, PackedWeight) or name in experts), None)
        if packed:
            raise ArgumentError(
                f"unfrozen_parameters: {pattern!r} matches {packed}, whose packed weights are frozen; train experts "
                "through lora_target_parameters, convert a checkpoint whose linear layers are to be trained with "
                "--dense none"
            )
        names |= dict.fromkeys(name for name, _ in matched)
    return list(names)
