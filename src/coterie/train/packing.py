"""Whether a model keeps samples apart that are packed into one sequence, found by trying it.

A packed batch says where samples begin (position ids that start anew, cumulated lengths), and the model's attention
and convolutions must heed it. Some do not, or only with kernels for GPUs, and train on a mixture in silence. So a small
copy of the architecture computes two samples packed and one by itself.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from coterie.errors import ArgumentError
from coterie.hf.described import load_config

VOCABULARY = 128
FIRST, SECOND = 13, 11  # tokens of the two samples
TOLERANCE = 0.01  # of the norm of a token's logits: rounding is 1e-5 of it, a leak about 1
LAYERS = 4
INTERMEDIATE = 8
NARROW = 128


def check_packing(base: str, trust_remote_code: bool, device: torch.device) -> bool:
    """Whether a small copy of the model could be tried, on the device that is to compute it; raises ArgumentError where
    that mixes packed samples."""
    try:
        config = load_config(base, trust_remote_code=trust_remote_code)
        model = small_model(config, trust_remote_code).to(device)
        alone(model)
    except Exception:  # an architecture that cannot be made small is tried when it is loaded
        return False
    refuse_mixing(model)
    return True


def refuse_mixing(model: nn.Module) -> None:
    """Raises ArgumentError where `model` (which computes) mixes samples that are packed into one sequence."""
    reason = mixing(model)
    if reason:
        raise ArgumentError(
            f"sample_packing: {type(model).__name__} does not keep packed samples apart here ({reason}); "
            "set sample_packing: false"
        )


def mixing(model: nn.Module) -> str | None:
    """How samples that are packed affect each other, or None."""
    samples = [token_ids(model, FIRST), token_ids(model, SECOND)]
    collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collate([{"input_ids": ids} for ids in samples])
    del batch["labels"]
    try:
        packed = logits(model, **batch)[FIRST:]
    except (ValueError, RuntimeError, NotImplementedError, ImportError) as error:
        return str(error).strip().splitlines()[0]
    single = alone(model)
    # The median, because a token whose router hesitates between two experts may change its mind by rounding.
    difference = ((packed - single).norm(dim=-1) / single.norm(dim=-1)).median().item()
    return "what a sample computes depends on the samples before it" if difference > TOLERANCE else None


def alone(model: nn.Module) -> torch.Tensor:
    """The logits [SECOND, V] of the second sample by itself."""
    return logits(model, input_ids=torch.tensor([token_ids(model, SECOND)]))


def token_ids(model: nn.Module, length: int) -> list[int]:
    size = min(VOCABULARY, model.config.get_text_config().vocab_size)
    return [3 + (7 * length + 5 * i) % (size - 3) for i in range(length)]


def logits(model: nn.Module, **inputs: Any) -> torch.Tensor:
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            inputs = {name: x.to(model.device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
            return model(**inputs, use_cache=False).logits[0].float()
    finally:
        model.train(was_training)


def small_model(config: Any, trust_remote_code: bool) -> nn.Module:
    """A model of the same architecture with few, narrow layers, and weights that let everything matter."""
    with torch.random.fork_rng(devices=[]):  # the small copy is on the CPU
        torch.manual_seed(0)
        small = shrink(config)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32, trust_remote_code=trust_remote_code)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def shrink(config: Any) -> Any:
    """A copy of a config with the layers that it takes to have one of each kind, fewer heads, and narrow experts."""
    small = copy.deepcopy(config)
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    text = small.get_text_config()
    layers = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None)
    few = 1 + max(kinds.index(kind) for kind in set(kinds)) if kinds else min(layers, LAYERS)
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:few])
        elif "intermediate_size" in name and isinstance(value, int):
            setattr(text, name, min(value, INTERMEDIATE))
    text.num_hidden_layers = few
    text.vocab_size = min(text.vocab_size, VOCABULARY)
    text.pad_token_id = None
    divide_heads(text)
    return small


def divide_heads(text: Any) -> None:
    """Divides hidden size and numbers of heads by what they have in common, down to a hidden size of NARROW or more."""
    if getattr(text, "is_heterogeneous", False):  # layers have their own numbers and widths of heads, which stay
        text.hidden_size = min(text.hidden_size, NARROW)
        return
    heads = text.num_attention_heads
    shared = math.gcd(heads, getattr(text, "num_key_value_heads", None) or heads, text.hidden_size)
    while shared > 1 and text.hidden_size // shared < NARROW:
        shared //= 2
    if text.hidden_size % shared or heads % shared:
        return
    for name in ("num_attention_heads", "num_key_value_heads", "hidden_size"):
        value = getattr(text, name, None)
        if value:
            setattr(text, name, value // shared)
