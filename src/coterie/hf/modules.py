"""Finding the experts modules of a model, and putting packed experts in the place of their parameters."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

import torch
from torch import nn

from coterie.checkpoints.packed_formats import ModelFormats
from coterie.errors import UnsupportedModelError
from coterie.experts import Experts
from coterie.formats import Formats
from coterie.hf.layout import Layout, is_experts, read_layout
from coterie.hf.packed import PackedModule
from coterie.hf.weight import PackedWeight

ATTRIBUTE = "packed_module"
HIDDEN = "hidden_parameters"


def read_layouts(model: nn.Module) -> dict[str, Layout]:
    """The layout of every experts module of `model`, by module name, in order.

    Raises UnsupportedModelError, naming the model's class and the reason: it is dense, its experts do not go through
    Transformers' experts interface, or they compute something that no kernel does.
    """
    name = type(model).__name__
    found = {path: module for path, module in model.named_modules() if is_experts(module)}
    if not found:
        for path, module in model.named_modules():
            if module is not model and re.search(r"Experts?$|MoE$|Moe$", type(module).__name__):
                raise UnsupportedModelError(
                    f"{name} is not supported: its {type(module).__name__} ({path}) does not use Transformers' experts "
                    "interface"
                )
        raise UnsupportedModelError(
            f"{name} has no experts; coterie packs Mixture-of-Experts models, load this one with transformers alone"
        )
    try:
        return {path: read_layout(module) for path, module in found.items()}
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{name}: {error}") from None


def number_layers(names: list[str]) -> dict[str, int]:
    """Layer numbers of experts modules: the first number in the name, or the position where that is not unique."""
    found = [re.search(r"\d+", name) for name in names]
    numbers = [int(match[0]) for match in found if match]
    if len(set(numbers)) < len(names):
        numbers = list(range(len(names)))
    return dict(zip(names, numbers, strict=True))


def formats_by_name(formats: ModelFormats, names: list[str]) -> dict[str, Formats]:
    """The formats of experts modules, by their names."""
    return {name: formats[number] for name, number in number_layers(names).items()}


def packed_module(module: nn.Module) -> PackedModule | None:
    """The packed experts that stand in an experts module, None while its own parameters do."""
    return module.__dict__.get(ATTRIBUTE)


def packed_modules(model: nn.Module) -> Iterator[tuple[str, PackedModule]]:
    """The packed experts modules of a model: (module name, packed experts), in order."""
    for name, module in model.named_modules():
        if (packed := packed_module(module)) is not None:
            yield name, packed


def attach(module: nn.Module, experts: Experts, layout: Layout) -> PackedModule:
    """Puts packed experts into an experts module: its parameters become `PackedWeight`s of the same names."""
    packed = PackedModule(experts, layout)
    for name in layout.parameters:
        weight = PackedWeight(packed, name, module._parameters[name].dtype)
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)
        module._parameters[name]._is_hf_initialized = True
    module.__dict__[ATTRIBUTE] = packed
    module.extra_repr = packed.extra_repr
    return packed


def unpack(module: nn.Module, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Puts dequantised parameters back into a packed experts module, and back into its state dict."""
    remove_hooks(module)
    packed = module.__dict__.pop(ATTRIBUTE)
    del module.extra_repr
    for name in packed.layout.parameters:
        module._parameters[name] = nn.Parameter(packed.dense(name, dtype).to(device), requires_grad=False)


def hide_parameters(module: nn.Module, names: Collection[str] | None = None) -> None:
    """Keeps parameters of a module, all or those named, out of state dicts while Transformers loads the others."""
    hidden = module.__dict__.setdefault(HIDDEN, set())
    if not hidden:
        module.register_state_dict_post_hook(_drop_from_state_dict)
        module.register_load_state_dict_post_hook(_drop_from_missing)
    hidden.update(module._parameters if names is None else names)


def show_dense(module: nn.Module) -> None:
    """Puts the dequantised parameters of a packed experts module into state dicts."""
    module.register_state_dict_post_hook(_dense_in_state_dict)


def remove_hooks(module: nn.Module) -> None:
    """Undoes `hide_parameters` and `show_dense`."""
    ours = (_drop_from_state_dict, _drop_from_missing, _dense_in_state_dict)
    for hooks in (module._state_dict_hooks, module._load_state_dict_post_hooks):
        for key in [key for key, hook in hooks.items() if hook in ours]:
            del hooks[key]
    module.__dict__.pop(HIDDEN, None)


def _drop_from_state_dict(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for name in module.__dict__[HIDDEN]:
        state_dict.pop(prefix + name, None)


def _drop_from_missing(module: nn.Module, incompatible_keys) -> None:
    hidden, missing = module.__dict__[HIDDEN], incompatible_keys.missing_keys
    suffixes = tuple("." + name for name in hidden)
    missing[:] = [key for key in missing if not key.endswith(suffixes) and key not in hidden]


def _dense_in_state_dict(module: nn.Module, state_dict: dict, prefix: str, local_metadata: dict) -> None:
    for name in module._parameters:
        weight = state_dict.get(prefix + name)
        if isinstance(weight, PackedWeight):
            state_dict[prefix + name] = weight.dense()
