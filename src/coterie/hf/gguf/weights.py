"""A GGUF file opened by Transformers: found, and the weights beside the experts."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as by_table
from transformers.utils import cached_file

from coterie.checkpoints.gguf_file import GgufFile, file_names
from coterie.checkpoints.tensorfile import shown
from coterie.errors import CheckpointError
from coterie.hf.gguf.families import family_of
from coterie.hf.gguf.family import parameters
from coterie.hf.modules import read_layouts
from coterie.hf.names import parameters_in

PIECE = 4 << 20  # numbers of a tensor that are dequantised at a time


def fetch_gguf(path_or_id: str | os.PathLike, name: str, hub: dict[str, Any]) -> Path:
    """A GGUF file of a folder or of a Hugging Face id, fetched with all files of its model where it is not here.

    hub: arguments of Transformers that say where to look. Raises CheckpointError where there is no such file.
    """
    try:
        files = [cached_file(path_or_id, file, **hub) for file in file_names(name)]
    except OSError as error:
        raise CheckpointError(f"{path_or_id} has no {shown(name)}: {shown(str(error))}") from error
    return Path(files[0])


Make = Callable[[Callable[[str], Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class RestWeight:
    """A parameter beside the experts: `make` makes it of the tensors of a file, given what reads one by its name.

    tensors: those, that which says the type first. kept: whether the parameter is that tensor as it is.
    """

    file: GgufFile
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    kept: bool
    make: Make

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Its values, flat, one behind the other: in `dtype`, or in float32 where the file has them so."""
        dtype = self.dtype(dtype)
        if not self.kept or len(self.shape) != 2:
            yield self.make(partial(_value, self.file)).to(dtype).flatten()
            return
        step = max(1, PIECE // self.shape[1])
        for start in range(0, self.shape[0], step):
            yield _value(self.file, self.tensors[0], slice(start, start + step)).to(dtype).flatten()

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The same in one."""
        found, start = torch.empty(math.prod(self.shape), dtype=self.dtype(dtype), device="cpu"), 0
        for piece in self.pieces(dtype):
            found[start : start + len(piece)] = piece
            start += len(piece)
        return found.view(self.shape)

    def dtype(self, quantised: torch.dtype) -> torch.dtype:
        return torch.float32 if self.file.type(self.tensors[0]) == "F32" else quantised


def rest_weights(file: GgufFile, model: PreTrainedModel) -> dict[str, RestWeight]:
    """All weights of `model`, which has none yet, but the experts', by parameter. A head that is none of a language
    model is not in a file. Nothing is read.

    Raises CheckpointError where a weight is missing, or of another shape, and where the file has one that Transformers
    does not know.
    """
    other_head = model.get_output_embeddings() is None
    experts = {f"{name}.{parameter}" for name in read_layouts(model) for parameter in _parameters(model, name)}
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    found = {}
    for tensor, parameter, make in _makers(file, model):
        if other_head and tensor.startswith("output."):
            continue
        if parameter not in shapes:
            raise CheckpointError(
                f"{file.path}, tensor {shown(tensor)}: Transformers does not know what it is to "
                f"{type(model).__name__}; use the original checkpoint"
            )
        stand_ins: dict[str, Tensor] = {}
        made = make(partial(_stand_in, file, stand_ins))
        if tuple(made.shape) != shapes[parameter]:
            raise CheckpointError(
                f"{file.path}, tensor {shown(tensor)}: shape {list(made.shape)}, expected {list(shapes[parameter])}"
            )
        found[parameter] = RestWeight(file, tuple(stand_ins), shapes[parameter], made is stand_ins[tensor], make)
    wanted = {name for name in shapes if not other_head or name.startswith(f"{model.base_model_prefix}.")}
    if missing := sorted(wanted - found.keys() - experts - tied):
        raise CheckpointError(
            f"{file.path} has no tensor for {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
        )
    return found


def kept_tensors(weights: dict[str, RestWeight]) -> dict[str, str]:
    """The tensors of weights of which nothing else was changed, by parameter."""
    return {parameter: weight.tensors[0] for parameter, weight in weights.items() if weight.kept}


def _parameters(model: PreTrainedModel, name: str) -> list[str]:
    return list(model.get_submodule(name)._parameters)


def _value(file: GgufFile, name: str, rows: slice | None = None) -> Tensor:
    """A tensor, or some of its rows, in float32. What reading took is let go."""
    dense = file.dequantize(name, rows)
    found = torch.from_numpy(dense if dense.flags.writeable else dense.copy())
    file.release(name)
    return found


def _stand_in(file: GgufFile, made: dict[str, Tensor], name: str) -> Tensor:
    """A tensor's shape without storage, by which is found what becomes of it; it is put into `made`."""
    made[name] = torch.empty(file.shape(name), dtype=torch.float32, device="meta")
    return made[name]


def _makers(file: GgufFile, model: PreTrainedModel) -> Iterator[tuple[str, str, Make]]:
    """(tensor, parameter, what makes it) of all but experts and draft layers."""
    family, count, names = family_of(file), model.config.get_text_config().num_hidden_layers, []
    for name in file.names:
        block, _, leaf = name.removeprefix("blk.").partition(".") if name.startswith("blk.") else ("", "", name)
        known = family is not None and leaf in family.names
        if not (block.isdecimal() and int(block) >= count) and (known or "_exps." not in name):
            names.append(name)
        if name.endswith(".scale") and not known and "_exps." not in name:
            raise CheckpointError(
                f"{file.path}, tensor {shown(name)}: Transformers does not multiply by it; use the original checkpoint"
            )
    by_rules = _rules()
    if family is not None:
        yield from parameters(file, family, names)
    elif by_rules is not None and file.architecture in by_rules.GGUF_ARCHS:
        yield from _by_rules(model, by_rules.GGUF_ARCHS[file.architecture](model.config), names)
    else:
        yield from _by_table(file, model, names)


def _by_table(file: GgufFile, model: PreTrainedModel, names: list[str]) -> Iterator[tuple[str, str, Make]]:
    kind = by_table.TENSOR_PROCESSORS.get(file.architecture, by_table.TensorProcessor)
    processor = kind(config=model.config.to_dict())
    # Transformers asks each part of a model too, seconds of many layers, for names that the model itself has not.
    alone = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=dict)
    parameter_of = by_table.get_gguf_hf_weights_map(alone, processor, file.architecture)

    def parameter(name: str) -> str:
        stem = name.removesuffix(".weight")  # of what is a parameter of its own in Transformers: sinks
        return parameter_of.get(name) or parameter_of.get(stem, "")

    def process(name: str, weights: np.ndarray) -> Any:
        return processor.process(
            weights=weights, name=name, tensor_key_mapping=parameter_of, parsed_parameters={"tensors": {}}
        )

    def without_storage(shape: Sequence[int]) -> np.ndarray:
        return np.broadcast_to(np.float32(-1), tuple(shape))

    def make(name: str, value: Callable[[str], Tensor]) -> Tensor:
        weights = value(name)
        array = without_storage(weights.shape) if weights.is_meta else weights.numpy()
        made = process(name, array).weights
        if made is array:
            return weights
        return made if isinstance(made, Tensor) else torch.from_numpy(made.copy())

    made = {name: process(name, without_storage(file.shape(name))).name for name in names}
    if not all(map(parameter, made.values())):
        parameter_of = by_table.get_gguf_hf_weights_map(model, processor, file.architecture)
    for name, own in made.items():
        yield name, parameter(own), partial(make, name)


def _rules() -> Any:
    """What Transformers since 5.24 knows of some architectures: conversions as for other checkpoints."""
    try:
        return importlib.import_module("transformers.integrations.gguf")
    except ImportError:
        return None


def _by_rules(model: PreTrainedModel, rules: list, names: list[str]) -> Iterator[tuple[str, str, Make]]:
    def make(
        name: str, parameter: str, operations: Sequence[Any], pattern: str, value: Callable[[str], Tensor]
    ) -> Tensor:
        dense = value(name)
        for operation in operations:
            (dense,) = operation.convert({pattern: dense}, [pattern], [parameter]).values()
        return dense

    for name, parameter, converter, pattern in parameters_in(model, rules, names, model.state_dict().keys()):
        operations = converter.operations if converter is not None else ()
        yield name, parameter, partial(make, name, parameter, operations, pattern)
