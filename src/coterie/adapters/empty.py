"""A base model without weights, under an adapter with its own: what PEFT adapts, and by what."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from coterie.adapters.folder import TASKS
from coterie.errors import ArgumentError, UnsupportedModelError
from coterie.hf.adapter_fit import check_adapter
from coterie.hf.described import load_config
from coterie.hf.empty import empty_model
from coterie.hf.layout import Layout
from coterie.hf.modules import read_layouts

ADAPTER = "default"
PREFIX = "base_model.model."  # before the names in an adapter's file
CLASSES: dict[str, tuple[Any, ...]] = {
    "CAUSAL_LM": (AutoModelForCausalLM, AutoModelForImageTextToText),
    "SEQ_CLS": (AutoModelForSequenceClassification,),
    "TOKEN_CLS": (AutoModelForTokenClassification,),
}
HEADS = ("score.weight", "classifier.weight")  # whose rows are the labels of a classifier


@dataclass(frozen=True)
class Adapted:
    """A model on the meta device, alone and under an adapter in memory.

    own: the model of the class that the checkpoint is of, the same or one with more around it; layouts: the experts
    modules; stored: the adapter's tensors under the names that PEFT gives them.
    """

    own: PreTrainedModel
    plain: PreTrainedModel
    peft: PeftModel
    layouts: dict[str, Layout]
    stored: dict[str, Tensor]

    @property
    def config(self) -> LoraConfig:
        return self.peft.peft_config[ADAPTER]

    @property
    def classifies(self) -> bool:
        return self.config.task_type in ("SEQ_CLS", "TOKEN_CLS")

    def changed(self) -> Iterator[tuple[str, nn.Module]]:
        """The outermost modules that PEFT put in the place of the model's own, by name."""
        last: str | None = None
        for name, module in self.peft.get_base_model().named_modules():
            if last is not None and name.startswith(last):
                continue
            if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                last = f"{name}."
                yield name, module

    def experts(self) -> dict[str, ParamWrapper]:
        """The outermost wrappers around experts, by module name."""
        return {name: module for name, module in self.changed() if name in self.layouts}


def adapt_empty(base: str, revision: str | None, lora: LoraConfig, stored: dict[str, Tensor]) -> Adapted:
    """The model of `base`'s config.json, on the meta device, under the adapter.

    stored: the adapter's tensors. The model is of the first class that `base` can be opened as and the adapter fits.
    Raises ArgumentError for an adapter that does not fit.
    """
    lora.inference_mode = True
    task = lora.task_type or TASKS[0]
    labels = next((len(stored[key]) for head in HEADS for key in stored if key.endswith(f".{head}")), None)
    config = load_config(base, revision=revision, **({"num_labels": labels} if labels else {}))
    models, reasons = [], []
    for auto in CLASSES[task]:
        try:
            models.append(empty_model(config, auto))
        except UnsupportedModelError as error:
            reasons.append(error)
    if not models:
        raise ArgumentError(f"{base} cannot be opened as a model for {task}, which the adapter is for: {reasons[0]}")
    models.sort(key=lambda model: type(model).__name__ not in (config.architectures or []))
    problems = []
    for model in models:
        try:
            peft, tensors = adapt(copy.deepcopy(model), base, copy.deepcopy(lora), stored)
            return Adapted(models[0], model, peft, read_layouts(model), tensors)
        except ArgumentError as error:
            problems.append(error)
    raise problems[0]


def adapt(
    model: PreTrainedModel, base: str, lora: LoraConfig, stored: dict[str, Tensor]
) -> tuple[PeftModel, dict[str, Tensor]]:
    trained_on, lora.base_model_name_or_path = lora.base_model_name_or_path, None
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, lora, autocast_adapter_dtype=False)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ArgumentError(f"the adapter does not fit {base}: {' '.join(str(error).split())[:300]}") from error
    lora.base_model_name_or_path = trained_on
    found = check_adapter(adapted, ADAPTER, stored, base)
    values = {id(parameter): tensor for parameter, tensor in found.values()}
    for module in adapted.modules():
        for key, parameter in module._parameters.items():
            if id(parameter) in values:
                module._parameters[key] = nn.Parameter(values[id(parameter)], requires_grad=False)
    return adapted, {key: tensor for key, (_, tensor) in found.items()}
