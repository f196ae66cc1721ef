"""A checkpoint that others quantised, opened by Transformers: its experts in their own format, the rest dequantised."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightTransform

from coterie.checkpoints import LayerReader, Reader, open_reader
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.packed_formats import ModelFormats
from coterie.checkpoints.quantised import says_quantised
from coterie.convert.cpu import formats_for
from coterie.convert.tensors import Written, written_tensors
from coterie.errors import ArgumentError, CheckpointError, UnsupportedModelError
from coterie.experts import Experts
from coterie.formats import Format, Formats
from coterie.hf.layout import Layout
from coterie.hf.linears import FormatOf
from coterie.hf.modules import hide_parameters, number_layers
from coterie.hf.names import parameters_in


@dataclass(frozen=True, slots=True)
class Quantised:
    """What `convert` would make of a quantised checkpoint.

    readers: of the experts, by module name. rest: the weights to be dequantised, those of `folder`.
    """

    folder: Folder | None
    readers: dict[str, LayerReader]
    rest: tuple[Written, ...]

    def formats(self, asked: dict[str, Any]) -> ModelFormats:
        """The format asked for (`experts`, `group_size`, `zero_point`, if they were given), or else the experts' own.

        Raises ArgumentError as `formats_for` does.
        """
        numbers = number_layers(list(self.readers))
        readers = {numbers[name]: reader for name, reader in self.readers.items()}
        return formats_for(readers, asked.get("experts"), asked.get("group_size"), asked.get("zero_point", False))

    def experts(self, name: str, formats: Formats, scale_search: bool) -> Experts:
        """The experts of a module, packed as `formats`. Raises CheckpointError for weights that it cannot hold."""
        try:
            return Experts.from_reader(self.readers[name], format=formats, scale_search=scale_search)
        except ArgumentError as error:
            raise CheckpointError(f"{name}: {error}") from error

    def formats_of(self, model: PreTrainedModel) -> FormatOf:
        """What says in which format the codes of a parameter of `model` beside the experts are; nothing is read."""
        weights, known = {weight.name: weight for weight in self.rest}, model.state_dict().keys()
        found = parameters_in(model, get_model_conversion_mapping(model), weights, known)
        sources = {parameter: weights[tensor] for tensor, parameter, converter, _ in found if converter is None}

        def format_of(parameter: str, spec: Format | None) -> Format | None:
            return sources[parameter].format(self.folder, spec) if parameter in sources else None

        return format_of

    def load_rest(
        self, model: PreTrainedModel, conversions: list[WeightTransform], kept: Collection[str]
    ) -> dict[str, Written]:
        """Puts the dequantised weights into `model`, which is without weights yet, and out of its state dict, so that
        Transformers looks for the others alone; but those of the modules `kept`, which are packed of their codes later.
        Returns them all by parameter.

        Raises UnsupportedModelError for a weight that Transformers would join with others, CheckpointError for one of
        another shape than the model's.
        """
        weights = {weight.name: weight for weight in self.rest}
        known = model.state_dict().keys() | {f"{name}.weight" for name in kept}  # which are out of it already
        loaded: dict[str, Written] = {}
        for tensor, parameter, converter, _ in parameters_in(model, copy.deepcopy(conversions), weights, known):
            if parameter not in known:
                continue  # of a draft layer, or of a head that this class has not
            if converter is not None:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: {tensor} is quantised, and {parameter} is made of several tensors: "
                    "pack the checkpoint with coterie convert cpu first"
                )
            name, _, leaf = parameter.rpartition(".")
            module = model.get_submodule(name)
            empty, weight = module._parameters[leaf], weights[tensor]
            if tuple(empty.shape) != weight.shape:
                raise CheckpointError(
                    f"{self.folder.path}, tensor {weight.source}: shape {list(weight.shape)}, "
                    f"expected {list(empty.shape)}"
                )
            if name not in kept:
                dense = weight.tensor(self.folder).to(empty.dtype)
                module._parameters[leaf] = nn.Parameter(dense, requires_grad=empty.requires_grad)
            module._parameters[leaf]._is_hf_initialized = True
            hide_parameters(module, {leaf})
            suffixes = "|".join(map(re.escape, weight.scheme.known if weight.scheme else ()))
            beside = rf"(^|\.){re.escape(name.partition('.')[2] or name)}({suffixes})$"
            model._keys_to_ignore_on_load_unexpected |= {beside}
            loaded[parameter] = weight
        return loaded


def open_quantised(path: Path, layouts: dict[str, Layout]) -> Quantised | None:
    """The checkpoint in the folder `path`, for the experts modules `layouts`; None where it is not quantised.

    Raises CheckpointError where it is quantised in a way that is not read, or not what its config.json says.
    """
    if not says_quantised(path):
        return None
    reader = open_reader(path)
    readers = read_experts(reader, layouts, path)
    experts = {tensor for layer in readers.values() for tensor in layer.tensors}
    assert reader.folder is not None
    names = [name for name in reader.folder.shard_of if name not in experts]
    rest = tuple(weight for weight in written_tensors(reader.folder, names, reader.schemes) if weight.scheme)
    return Quantised(reader.folder, readers, rest)


def read_experts(reader: Reader, layouts: dict[str, Layout], path: Path) -> dict[str, LayerReader]:
    """The experts of each module, by its name. Raises CheckpointError where they are not what config.json says."""
    numbers = number_layers(list(layouts))
    readers = {name: reader.layer(number) for name, number in numbers.items()}
    for name, layout in layouts.items():
        layout.check_found(f"{path}, layer {numbers[name]}", readers[name])
    return readers
