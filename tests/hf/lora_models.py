"""A packed model and its dequantised twin, both under the same adapter."""

from __future__ import annotations

import copy
from pathlib import Path

import tiny_models
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import coterie
from coterie.hf.modules import packed_modules, unpack

PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def packed(path: Path, experts: str = "int8"):
    return coterie.from_pretrained(path, experts=experts, dtype=torch.float32)


def dequantised(path: Path, experts: str = "int8"):
    """The same model in Transformers alone, with the weights that the packed one stands for."""
    model = packed(path, experts)
    for name, _ in list(packed_modules(model)):
        unpack(model.get_submodule(name), torch.float32)
    model.set_experts_implementation("eager")
    return model


def adapt(model, seed: int = 0, **changes) -> PeftModel:
    """An adapter on attention and experts whose A and B are both random."""
    options = {"r": 4, "lora_alpha": 8, "target_parameters": PARAMETERS, **changes}
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**options))
    randomise(adapted, seed)
    return adapted


def randomise(model: PeftModel, seed: int) -> None:
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)


def twin(model: PeftModel, plain, seed: int = 0, **changes) -> PeftModel:
    """The same adapter on another model."""
    other = adapt(plain, seed, **changes)
    values = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    for name, parameter in other.named_parameters():
        if name in values:
            parameter.data = copy.deepcopy(values[name])
    return other


def loss_and_gradients(model) -> tuple[Tensor, dict[str, Tensor]]:
    ids = tiny_models.prompt(2, 12)
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
