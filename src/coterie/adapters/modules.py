"""One module under an adapter, merged by PEFT itself: LoRA of any kind, trained tokens, modules trained in full."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from coterie.adapters.empty import ADAPTER
from coterie.errors import ArgumentError
from coterie.hf.peft import wrappers


def changed_parameters(name: str, module: nn.Module) -> list[str]:
    """The names of the model's parameters that a module which PEFT put there may change."""
    if isinstance(module, ModulesToSaveWrapper):
        return [f"{name}.{key}" for key, _ in module.modules_to_save[ADAPTER].named_parameters()]
    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    if not isinstance(module, BaseTunerLayer):
        raise ArgumentError(f"what the adapter does to {name} ({type(module).__name__}) cannot be merged")
    return [f"{name}.{key}" for key, _ in module.get_base_layer().named_parameters(recurse=False)]


@torch.no_grad()
def merge_module(name: str, module: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """The parameters of `changed_parameters` as the adapter has them, by name.

    read: gives a parameter of the base model. What is merged is merged in float32. A parameter that is on the meta
    device had no tensor in the adapter's file: it is another's. Raises ArgumentError for what PEFT cannot merge.
    """
    if isinstance(module, ModulesToSaveWrapper):
        return {f"{name}.{key}": p.detach() for key, p in module.modules_to_save[ADAPTER].named_parameters()}
    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    chain = list(wrappers(module)) if isinstance(module, ParamWrapper) else [module]
    base = module.get_base_layer()
    empty = dict(base.named_parameters(recurse=False))
    try:
        for key, parameter in empty.items():
            value = read(f"{name}.{key}") if parameter.device.type == "meta" else parameter  # a bias that was trained
            setattr(base, key, nn.Parameter(value.float(), requires_grad=False))
        for layer in chain:
            layer.float()
            layer.merge(adapter_names=[ADAPTER])
        return {f"{name}.{key}": getattr(base, key).detach() for key in empty}
    except (ValueError, RuntimeError, NotImplementedError) as error:
        raise ArgumentError(f"{name} cannot be merged: {' '.join(str(error).split())[:300]}") from error
    finally:
        for key, parameter in empty.items():
            setattr(base, key, parameter)
        for layer in chain:
            layer.merged_adapters.clear()
