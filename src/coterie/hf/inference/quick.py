"""Norms, routers and linear layers of bf16 that take as little time while a model decodes as their work is small: by
the engine, a call each, or on a GPU by a kernel.

Norms and routers are found by their structure and proved by trying them, with weights of our own: what the module
answers is what the engine must answer. Prompts and whatever is trained are the modules' own, with gradients and
without: so a reference computes what the policy does, and a checkpointed layer what it did before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from coterie.hf.inference.norms import QuickNorm, norm_options
from coterie.hf.inference.plain import QuickLinear
from coterie.hf.inference.proving import STEP
from coterie.hf.inference.routers import QuickRouter, router_options
from coterie.hf.mixed import mixed

FINDERS = ((norm_options, QuickNorm), (router_options, QuickRouter))


def quicken(model: nn.Module) -> None:
    """Has the norms, routers and linear layers of a model become such wherever they can be."""
    known: dict[Any, Any] = {}
    for module in list(model.modules()):
        if type(module) is nn.Linear and module.weight.dtype == torch.bfloat16 and module.weight.is_cpu:
            module.__class__ = mixed(QuickLinear, nn.Linear)
            continue
        parameters = dict(module.named_parameters(recurse=False))
        weight = parameters.pop("weight", None)
        if weight is None or parameters.keys() - {"bias"} or any(module.children()) or weight.dtype not in STEP:
            continue
        for find, kind in FINDERS:
            key = (find, type(module), weight.shape, weight.dtype, *parameters, *sorted(_settings(module).items()))
            if key not in known:
                known[key] = find(module)
            if known[key] is not None:
                module.__class__ = mixed(kind, type(module))
                module.quick, module.quick_dtype = known[key], weight.dtype


def _settings(module: nn.Module) -> dict[str, Any]:
    """The numbers that a module was made with."""
    return {name: value for name, value in vars(module).items() if isinstance(value, int | float)}
