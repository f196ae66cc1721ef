"""Parameters that are trained in full, kept in float32 while the model computes in its own dtype.

A step of 2e-4 changes nothing in a bfloat16 weight of 1: the next number is 0.008 away.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def keep_float32(model: nn.Module) -> None:
    """Makes every trainable parameter of `model` float32; each forward pass sees it in the dtype that it had.

    The model goes on saying the dtype that it computes in, which is what is saved in config.json.
    """
    computed = {module: module.dtype for module in model.modules() if isinstance(module, PreTrainedModel)}
    narrow: dict[nn.Module, dict[str, torch.dtype]] = {}
    for module in model.modules():
        own = {n: p.dtype for n, p in module.named_parameters(recurse=False) if p.requires_grad and p.itemsize < 4}
        if own:
            narrow[module] = own
    for module, dtypes in narrow.items():
        for name in dtypes:
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.float()  # in place: it may be tied to another module's
        module.register_forward_pre_hook(functools.partial(show_cast, dtypes))
        module.register_forward_hook(functools.partial(hide_cast, dtypes), always_call=True)
    for module, dtype in computed.items():
        if module.dtype != dtype:
            say_dtype(module, dtype)


def say_dtype(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Makes a model say that it is of `dtype`, whatever its first parameter is: it gets a class of the same name."""
    kind = type(model)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    model.__class__ = type(kind.__name__, (kind,), {**names, "dtype": property(lambda self: dtype)})


def show_cast(dtypes: dict[str, torch.dtype], module: nn.Module, args: Any) -> None:
    """Puts the parameters, cast, where the module's forward finds them first."""
    for name, dtype in dtypes.items():
        module.__dict__[name] = module._parameters[name].to(dtype)


def hide_cast(dtypes: dict[str, torch.dtype], module: nn.Module, args: Any, output: Any) -> None:
    for name in dtypes:
        module.__dict__.pop(name, None)
