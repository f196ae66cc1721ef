"""A GGUF file opened by Transformers: found, and the weights beside the experts."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def fetch_gguf(path_or_id: str | os.PathLike, name: str, hub: dict[str, Any]) -> Path:
    """A GGUF file of a folder or of a Hugging Face id, fetched with all files of its model where it is not here.

    hub: arguments of Transformers that say where to look. Raises CheckpointError where there is no such file.
    """
    try:
        files = [cached_file(path_or_id, file, **hub) for file in file_names(name)]
    except OSError as error:
        raise CheckpointError(f"{path_or_id} has no {shown(name)}: {shown(str(error))}") from error
    return Path(files[0])


def read_rest(file: GgufFile, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All weights of `model`, which has none yet, but the experts', by parameter: dequantised to the model's dtype, or
    as they are where the file has plain numbers. A head that is none of a language model is not in a file.
    And the tensors of those of which nothing else was changed, by parameter.

    Raises CheckpointError where a weight is missing, or the file has one that Transformers does not know.
    """
    other_head = model.get_output_embeddings() is None
    experts = {f"{name}.{parameter}" for name in read_layouts(model) for parameter in _parameters(model, name)}
    known = model.state_dict().keys()
    tied = set(model.all_tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    found, kept = {}, {}
    for tensor, parameter, dense, is_kept in _converted(file, model):
        if other_head and tensor.startswith("output."):
            continue
        if parameter not in known:
            raise CheckpointError(
                f"{file.path}, tensor {shown(tensor)}: Transformers does not know what it is to "
                f"{type(model).__name__}; use the original checkpoint"
            )
        shape = tuple(model.state_dict()[parameter].shape)
        if tuple(dense.shape) != shape:
            raise CheckpointError(
                f"{file.path}, tensor {shown(tensor)}: shape {list(dense.shape)}, expected {list(shape)}"
            )
        found[parameter] = dense
        if is_kept:
            kept[parameter] = tensor
    wanted = {name for name in known if not other_head or name.startswith(f"{model.base_model_prefix}.")}
    if missing := sorted(wanted - found.keys() - experts - tied):
        raise CheckpointError(
            f"{file.path} has no tensor for {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
        )
    return found, kept


def _parameters(model: PreTrainedModel, name: str) -> list[str]:
    return list(model.get_submodule(name)._parameters)


def _converted(file: GgufFile, model: PreTrainedModel) -> Iterator[tuple[str, str, Tensor, bool]]:
    """(tensor, parameter, value, whether it is the tensor's own) of all but experts and draft layers."""
    count, names = model.config.get_text_config().num_hidden_layers, []
    for name in file.names:
        block, *_ = name.removeprefix("blk.").split(".") if name.startswith("blk.") else ("",)
        if not (block and int(block) >= count) and "_exps." not in name:
            names.append(name)
        if name.endswith(".scale") and "_exps." not in name:
            raise CheckpointError(
                f"{file.path}, tensor {shown(name)}: Transformers does not multiply by it; use the original checkpoint"
            )
    family = family_of(file)
    if family is not None:
        for name, parameter, dense in parameters(file, family, names):
            yield name, parameter, _cast(file, name, dense, model.dtype), family.keeps(name)
        return
    by_rules = _rules()
    if by_rules is not None and file.architecture in by_rules.GGUF_ARCHS:
        yield from _by_rules(file, model, by_rules.GGUF_ARCHS[file.architecture](model.config), names)
        return
    kind = by_table.TENSOR_PROCESSORS.get(file.architecture, by_table.TensorProcessor)
    processor = kind(config=model.config.to_dict())
    parameter_of = by_table.get_gguf_hf_weights_map(model, processor, file.architecture)
    for name in names:
        weights = file.dequantize(name)
        made = processor.process(
            weights=weights, name=name, tensor_key_mapping=parameter_of, parsed_parameters={"tensors": {}}
        )
        dense = made.weights if isinstance(made.weights, Tensor) else torch.from_numpy(made.weights.copy())
        stem = made.name.removesuffix(".weight")  # of what is a parameter of its own in Transformers: sinks
        parameter = parameter_of.get(made.name) or parameter_of.get(stem, "")
        yield name, parameter, _cast(file, name, dense, model.dtype), made.weights is weights


def _rules() -> Any:
    """What Transformers since 5.24 knows of some architectures: conversions as for other checkpoints."""
    try:
        return importlib.import_module("transformers.integrations.gguf")
    except ImportError:
        return None


def _by_rules(
    file: GgufFile, model: PreTrainedModel, rules: list, names: list[str]
) -> Iterator[tuple[str, str, Tensor, bool]]:
    for name, parameter, converter, pattern in parameters_in(model, rules, names, model.state_dict().keys()):
        dense = torch.from_numpy(file.dequantize(name).copy())
        for operation in converter.operations if converter is not None else ():
            (dense,) = operation.convert({pattern: dense}, [pattern], [parameter]).values()
        yield name, parameter, _cast(file, name, dense, model.dtype), converter is None


def _cast(file: GgufFile, name: str, dense: Tensor, dtype: torch.dtype) -> Tensor:
    file.release(name)
    return dense if file.type(name) == "F32" else dense.to(dtype)
