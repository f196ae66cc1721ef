"""What the parameters of a model are called in its checkpoints, and the other way round.

Transformers knows how each model's checkpoint names map to parameters, and turns that list around when it saves. It is
asked here about single parameters; how a checkpoint stores experts is found by giving it numbers and looking at where
they went. No table of models.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)

from coterie.errors import UnsupportedModelError
from coterie.hf.layout import Layout


@dataclass(frozen=True)
class ExpertNames:
    """How a checkpoint stores the weights of one experts module: each expert's apart, or a layer's stacked.

    apart: (expert, projection) -> the tensor that holds that matrix as [rows, columns].
    stacked: parameter -> the tensor that holds all of it, as the module does or (in `transposed`) its last two sizes
    swapped.
    """

    apart: dict[tuple[int, str], str]
    stacked: dict[str, str]
    transposed: set[str]


def parameters_in(
    model: PreTrainedModel, conversions: list[WeightTransform], tensors: Iterable[str], known: Collection[str]
) -> Iterator[tuple[str, str, WeightConverter | None, str]]:
    """What Transformers makes of the tensors of a checkpoint: (tensor, parameter, converter, the pattern it matches).

    Without a converter the tensor is the parameter, and the pattern "". `known` are the names that `model` has.
    """
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    converter_of = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    state = dict.fromkeys(known, True)
    for tensor in tensors:
        parameter, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        if parameter not in state and tensor in state:
            parameter, pattern = tensor, None
        yield tensor, parameter, converter_of[pattern] if pattern is not None else None, pattern or ""


def parameters_of(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """The tensors of a checkpoint that are a parameter by themselves: parameter -> tensor."""
    known = model.state_dict().keys()
    found = parameters_in(model, get_model_conversion_mapping(model), tensors, known)
    return {parameter: tensor for tensor, parameter, converter, _ in found if converter is None and parameter in known}


def stored_name(model: PreTrainedModel, parameter: str) -> str:
    """What a parameter is called in the checkpoints that `model` saves; its own name where it is not one tensor."""
    names = list(revert_weight_conversion(model, {parameter: torch.zeros(2, 2)}))
    return names[0] if len(names) == 1 else parameter


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """The tensors that the checkpoints of `model` need not store, since they are another: {its name: the other's}."""
    return {stored_name(model, name): stored_name(model, other) for name, other in model.all_tied_weights_keys.items()}


def expert_names(model: PreTrainedModel, module: str, layout: Layout) -> ExpertNames:
    """How the checkpoints that `model` saves store the weights of an experts module.

    Raises UnsupportedModelError where they are stored in a way that is neither.
    """
    small = dataclasses.replace(layout, hidden_size=5, intermediate_size=3)
    names = ExpertNames({}, {}, set())
    for parameter in layout.weights:
        shape = small.shape(parameter)
        numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float32, device="cpu").view(shape)
        matrices = {
            (expert, projection): matrix
            for expert in range(layout.num_experts)
            for projection, matrix in small.split_weight(parameter, numbers[expert]).items()
        }
        stored = revert_weight_conversion(model, {f"{module}.{parameter}": numbers})
        name, tensor = next(iter(stored.items()))
        if same(numbers, tensor) or same(numbers.mT, tensor):
            names.stacked[parameter] = name
            if not same(numbers, tensor):
                names.transposed.add(parameter)
            continue
        first = {matrix[0, 0].item(): key for key, matrix in matrices.items()}
        for name, tensor in stored.items():
            key = first.get(tensor.flatten()[0].item())
            if key is None or not same(matrices[key], tensor):
                raise UnsupportedModelError(
                    f"{type(model).__name__}: its checkpoints store {module}.{parameter} neither as one tensor nor as "
                    f"one matrix an expert ({name} {list(tensor.shape)})"
                )
            names.apart[key] = name
    return names


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
