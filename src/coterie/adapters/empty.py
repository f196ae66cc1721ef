"""A base model without weights, under an adapter with its own: what PEFT adapts, and by what."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from coterie.errors import ArgumentError
from coterie.hf.adapter_fit import check_fits, lora_shapes
from coterie.hf.peft import wrappers

ADAPTER = "default"
PREFIX = "base_model.model."  # before the names in an adapter's file


def adapt_empty(base: str, config: LoraConfig, stored: dict[str, Tensor]) -> PeftModel:
    """The model of `base`'s config.json, on the meta device, under the adapter; its LoRA of experts is in memory.

    stored: the adapter's tensors. Raises ArgumentError for an adapter that does not fit.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        config.inference_mode = True
        trained_on = config.base_model_name_or_path
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ArgumentError(f"the adapter does not fit {base}: {error}") from error
    check_fits(lora_shapes(adapted, ADAPTER), stored, base, trained_on)
    for name, outer in wrapped_experts(adapted).items():
        for depth, wrapper in enumerate(wrappers(outer)):
            for part in ("A", "B"):
                weight = stored[lora_key(name, depth, part)]
                getattr(wrapper, f"lora_{part}")[ADAPTER].weight = nn.Parameter(weight, requires_grad=False)
    return adapted


def wrapped_experts(adapted: PeftModel) -> dict[str, ParamWrapper]:
    """The outermost wrappers around experts, by module name."""
    return {
        name: module
        for name, module in adapted.base_model.model.named_modules()
        if isinstance(module, ParamWrapper) and not name.endswith("base_layer")
    }


def lora_key(name: str, depth: int, part: str) -> str:
    """The stored name of A or B of a wrapper `depth` steps inside of the outermost one around module `name`."""
    return f"{PREFIX}{name}.{'base_layer.' * depth}lora_{part}.weight"
