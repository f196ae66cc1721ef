"""Whether a saved adapter belongs to a model, said before any of it is loaded.

PEFT loads what has a place and only warns of what is missing, so that an adapter of a model with more or fewer layers
would be half applied.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from peft import peft_model
from torch import Tensor, nn

from coterie.errors import ArgumentError
from coterie.hf.peft import computed_here

SINGLE_EXPERTS = re.compile(r"experts\.\d+\.")  # adapters of older Transformers, which PEFT converts
PAIRS = re.compile(r"\.lora_(embedding_)?[AB]\b")

stock_set_state = peft_model.set_peft_model_state_dict


def lora_shapes(model: nn.Module, adapter: str) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's A and B in a PeftModel, by the names that they are saved under."""
    found = {}
    for name, parameter in model.named_parameters():
        before, _, after = f"{name}.".rpartition(f".{adapter}.")
        if PAIRS.search(before):
            found[f"{before}.{after}".rstrip(".")] = tuple(parameter.shape)
    return found


def check_fits(
    expected: Mapping[str, tuple[int, ...]], stored: Mapping[str, Tensor], model: str, trained_on: str | None
) -> None:
    """Raises ArgumentError unless A and B among `stored` are those of `lora_shapes`.

    model: what they are to be loaded into; trained_on: what the adapter says it was trained on; both for the message.
    """
    found = {name: tuple(tensor.shape) for name, tensor in stored.items() if PAIRS.search(name)}
    advice = f"; load it into the model it was trained on ({trained_on or 'which it does not say'})"
    for name in expected:
        if name in found and expected[name] != found[name]:
            raise ArgumentError(
                f"the adapter does not fit {model}: {name}: expected shape {list(expected[name])}, found "
                f"{list(found[name])}{advice}"
            )
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        parts = [
            f"{len(names)} {what}, {names[0]} for one"
            for names, what in ((missing, "are missing"), (unexpected, "have no place in it"))
            if names
        ]
        raise ArgumentError(
            f"the adapter does not fit {model}: expected {len(expected)} LoRA tensors, found {len(found)}: "
            f"{'; '.join(parts)}{advice}"
        )


@functools.wraps(stock_set_state)
def set_state(model: nn.Module, peft_model_state_dict: dict, adapter_name: str = "default", *args, **kwargs) -> Any:
    ours = any(computed_here(module) for module in model.modules())
    relaxed = kwargs.get("ignore_mismatched_sizes") or any(map(SINGLE_EXPERTS.search, peft_model_state_dict))
    if ours and not relaxed:
        trained_on = model.peft_config[adapter_name].base_model_name_or_path
        expected = lora_shapes(model, adapter_name)
        check_fits(expected, peft_model_state_dict, type(model.get_base_model()).__name__, trained_on)
    return stock_set_state(model, peft_model_state_dict, adapter_name, *args, **kwargs)


peft_model.set_peft_model_state_dict = set_state
