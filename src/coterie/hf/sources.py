"""Where in a plain Hugging Face checkpoint the parameters of experts modules come from, found before any is read.

Transformers knows how each model's checkpoint names map to parameters: a list of renamings and converters. The same
list is asked here about every tensor name, so that experts can be read one at a time where Transformers would merge a
layer of them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightTransform,
    dot_natural_key,
)

from coterie.checkpoints.tensorfile import PLAIN_DTYPES, TensorFile
from coterie.errors import CheckpointError, MissingTensorError
from coterie.hf.layout import Layout
from coterie.hf.names import parameters_in


@dataclass(slots=True)
class Source:
    """The checkpoint tensors that make up one parameter of an experts module.

    `tensors` maps each source pattern of `converter` to the tensors that match it, in order; without a converter there
    is one tensor, the parameter itself.
    """

    parameter: str
    converter: WeightConverter | None
    tensors: dict[str, list[str]] = field(default_factory=dict)

    def per_expert(self, layout: Layout) -> bool:
        """Whether the converter does no more than stack one matrix per expert, and put gate and up side by side."""
        if self.converter is None or layout.is_transposed or not layout.is_concatenated:
            return False
        operations = self.converter.operations
        return (
            len(self.converter.target_patterns) == 1
            and [type(op) for op in operations] in ([MergeModulelist], [MergeModulelist, Concatenate])
            and len(self.converter.source_patterns) == len(layout.projections_of(self.parameter.rpartition(".")[2]))
            and operations[0].dim == 0
            and (operations[-1].dim == 1 if len(operations) == 2 else len(self.tensors) == 1)
        )


class Sources:
    """Every tensor of a checkpoint that belongs to an experts module of `model`.

    Raises CheckpointError or MissingTensorError, naming tensor, expected and found, when the checkpoint does not hold
    exactly what the experts modules need: before any weight is read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layouts: dict[str, Layout],
        conversions: list[WeightTransform],
        files: list[TensorFile],
    ):
        self._model = model
        self._layouts = layouts
        self._file_of = {name: file for file in files for name in file.entries}
        self._where = ", ".join(str(path) for path in sorted({file.path.parent for file in files}))
        conversions = copy.deepcopy(conversions)
        self._sources = self._find(conversions)
        for module, layout in layouts.items():
            for name in layout.parameters:
                self._check(module, name, layout, conversions)

    def read_experts(self, module: str, name: str) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Weight `name` by expert: (expert, {projection: [rows, cols]}), to be used before the next is asked for."""
        layout, source = self._layouts[module], self._sources[f"{module}.{name}"]
        if source.per_expert(layout):
            projections = layout.projections_of(name)
            for expert, tensors in enumerate(zip(*self._ordered(source), strict=True)):
                yield expert, dict(zip(projections, (self._file_of[t].tensor(t) for t in tensors), strict=True))
                for t in tensors:
                    self._file_of[t].release(t)
        elif source.converter is None:
            tensor = source.tensors[""][0]
            file = self._file_of[tensor]
            stacked = file.tensor(tensor)
            for expert in range(layout.num_experts):
                yield expert, layout.split_weight(name, stacked[expert])
                file.release(tensor, expert, layout.num_experts)
        else:
            stacked = self._convert(source)
            for expert in range(layout.num_experts):
                yield expert, layout.split_weight(name, stacked[expert])

    def read_bias(self, module: str, name: str) -> dict[str, Tensor]:
        """Bias `name` of all experts: {projection: [E, rows]} float32."""
        source = self._sources[f"{module}.{name}"]
        if source.converter is None:
            tensor = source.tensors[""][0]
            bias = self._file_of[tensor].tensor(tensor)
        else:
            bias = self._convert(source)
        return self._layouts[module].split_bias(name, bias)

    def _find(self, conversions: list[WeightTransform]) -> dict[str, Source]:
        known = {name for name, _ in (*self._model.named_parameters(), *self._model.named_buffers())}
        wanted = {f"{module}.{name}" for module, layout in self._layouts.items() for name in layout.parameters}
        found: dict[str, Source] = {}
        tensors = sorted(self._file_of, key=dot_natural_key)
        for tensor, parameter, converter, pattern in parameters_in(self._model, conversions, tensors, known):
            first, *others = converter.target_patterns if converter else [""]
            for target in [parameter, *(parameter.replace(first, other) for other in others)]:
                if target in wanted:
                    source = found.setdefault(target, Source(target, converter))
                    source.tensors.setdefault(pattern, []).append(tensor)
        return found

    def _check(self, module: str, name: str, layout: Layout, conversions: list[WeightTransform]) -> None:
        parameter = f"{module}.{name}"
        source = self._sources.get(parameter)
        if source is None:
            tried = ", ".join(_tried(parameter, conversions))
            raise MissingTensorError(f"{self._where}: nothing found for {parameter}; the names tried: {tried}")
        for tensor in (t for group in source.tensors.values() for t in group):
            entry = self._file_of[tensor].entry(tensor)
            if entry.dtype not in PLAIN_DTYPES:
                raise CheckpointError(
                    f"{self._file_of[tensor].path}, tensor {tensor}: dtype {entry.dtype}, "
                    f"expected one of {', '.join(PLAIN_DTYPES)}"
                )
        if source.per_expert(layout):
            self._check_per_expert(name, layout, source)
        elif source.converter is None:
            tensors = source.tensors[""]
            self._expect_shape(tensors[0], layout.shape(name))

    def _check_per_expert(self, name: str, layout: Layout, source: Source) -> None:
        patterns = source.converter.source_patterns
        absent = [pattern for pattern in patterns if pattern not in source.tensors]
        if absent:
            raise MissingTensorError(
                f"{self._where}: no tensors {', '.join(absent)}; {source.parameter} is made of {', '.join(patterns)}"
            )
        rows, cols = layout.hidden_size, layout.intermediate_size
        shape = (rows, cols) if name == "down_proj" else (cols, rows)
        for pattern, tensors in source.tensors.items():
            numbers = [int(re.findall(r"\.(\d+)\.", tensor)[-1]) for tensor in tensors]
            if numbers != list(range(layout.num_experts)):
                missing = sorted(set(range(layout.num_experts)) - set(numbers))
                detail = f"expert {missing[0]} is missing" if missing else f"the last is expert {max(numbers)}"
                raise CheckpointError(
                    f"{self._where}: {len(tensors)} experts for {source.parameter} ({pattern}), "
                    f"config.json says {layout.num_experts}: {detail}"
                )
            for tensor in tensors:
                self._expect_shape(tensor, shape)

    def _expect_shape(self, tensor: str, shape: tuple[int, ...]) -> None:
        file = self._file_of[tensor]
        found = file.entry(tensor).shape
        if found != shape:
            hint = ""
            if len(found) == len(shape) == 3 and found[0] != shape[0]:
                hint = f": {found[0]} experts, config.json says {shape[0]}"
            raise CheckpointError(f"{file.path}, tensor {tensor}: shape {list(found)}, expected {list(shape)}{hint}")

    def _ordered(self, source: Source) -> list[list[str]]:
        return [source.tensors[pattern] for pattern in source.converter.source_patterns]

    def _convert(self, source: Source) -> Tensor:
        """The parameter as Transformers' converter makes it, which takes the whole of it in memory."""
        converter = copy.deepcopy(source.converter)
        for pattern, tensors in source.tensors.items():
            for tensor in tensors:
                read = partial(self._file_of[tensor].tensor, tensor)
                converter.add_tensor(source.parameter, tensor, pattern, read)
        first = converter.target_patterns[0]
        suffix = next((t for t in converter.target_patterns if t in source.parameter), first)
        made = converter.convert(source.parameter.replace(suffix, first), model=self._model, config=self._model.config)
        value = made[source.parameter]
        value = value[0] if isinstance(value, list) else value
        module, _, name = source.parameter.rpartition(".")
        expected = self._layouts[module].shape(name)
        if tuple(value.shape) != expected:
            raise CheckpointError(
                f"{self._where}: {source.parameter} comes out as {list(value.shape)}, expected {list(expected)}"
            )
        return value


def _tried(parameter: str, conversions: list[WeightTransform]) -> list[str]:
    """The checkpoint names that would have become `parameter`, last part of each."""
    names = [parameter]
    for entry in conversions:
        for target in entry.target_patterns:
            if target.replace("\\", "") in parameter:
                names += [pattern.replace("\\", "") for pattern in entry.source_patterns]
    return names
