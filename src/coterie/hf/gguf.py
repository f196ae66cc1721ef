"""A GGUF file opened by Transformers: its config and tokenizer, and the weights beside the experts."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import modeling_gguf_pytorch_utils as by_table
from transformers.utils import cached_file

from coterie.checkpoints.gguf_file import GgufFile, file_names
from coterie.checkpoints.tensorfile import shown
from coterie.errors import CheckpointError, UnsupportedModelError
from coterie.hf.modules import read_layouts
from coterie.hf.names import parameters_in

# Metadata that Transformers does not read of every architecture -> what its configs call it.
FIELDS = {
    "attention.key_length": "head_dim",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
}


def fetch_gguf(path_or_id: str | os.PathLike, name: str, hub: dict[str, Any]) -> Path:
    """A GGUF file of a folder or of a Hugging Face id, fetched with all files of its model where it is not here.

    hub: arguments of Transformers that say where to look. Raises CheckpointError where there is no such file.
    """
    try:
        files = [cached_file(path_or_id, file, **hub) for file in file_names(name)]
    except OSError as error:
        raise CheckpointError(f"{path_or_id} has no {shown(name)}: {shown(str(error))}") from error
    return Path(files[0])


def read_config(file: GgufFile, **settings: Any) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config that Transformers makes of a file's metadata, changed by those of `settings` that are its own, and the
    other ones. Raises UnsupportedModelError, naming the architecture, where it cannot."""
    first, scaling = file.first, file.own_value("rope.scaling.type", "none")
    if scaling != "none" and "rope_parameters" not in settings:
        raise UnsupportedModelError(
            f"{file.path}: positions are scaled ({shown(scaling)}), which this version does not read of GGUF files: "
            "give rope_parameters=... as the original's config.json has them, or use the original checkpoint"
        )
    try:
        config, unused = AutoConfig.from_pretrained(
            first.parent, gguf_file=first.name, return_unused_kwargs=True, **settings
        )
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{file.path}: Transformers {transformers.__version__} does not open GGUF architecture "
            f"{shown(file.architecture)}: {shown(str(error))}; use the original checkpoint, or Experts.open for a layer"
        ) from error
    unused.pop("gguf_file", None)
    config.tie_word_embeddings = "output.weight" not in file.names  # which may be in another file than the metadata
    config.dtype = config.dtype or torch.bfloat16
    for key, name in FIELDS.items():
        value = file.own_value(key)
        if value is not None and hasattr(config, name) and name not in settings:
            setattr(config, name, value)
    return config, unused


def save_tokenizer(file: GgufFile, folder: str | os.PathLike) -> None:
    """Writes the tokenizer of a file, where it has one, into `folder`."""
    if file.value("tokenizer.ggml.model") is not None:
        AutoTokenizer.from_pretrained(file.first.parent, gguf_file=file.first.name).save_pretrained(folder)


def read_rest(file: GgufFile, model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights of `model`, which has none yet, but the experts', by parameter: dequantised to the model's dtype, or
    as they are where the file has plain numbers.

    Raises CheckpointError where a weight is missing, or the file has one that Transformers does not know.
    """
    experts = {f"{name}.{parameter}" for name in read_layouts(model) for parameter in _parameters(model, name)}
    known = model.state_dict().keys()
    tied = set(model.all_tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    found = {}
    for tensor, parameter, dense in _converted(file, model):
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
    if missing := sorted(known - found.keys() - experts - tied):
        raise CheckpointError(
            f"{file.path} has no tensor for {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}"
        )
    return found


def _parameters(model: PreTrainedModel, name: str) -> list[str]:
    return list(model.get_submodule(name)._parameters)


def _converted(file: GgufFile, model: PreTrainedModel) -> Iterator[tuple[str, str, Tensor]]:
    """(tensor, parameter, value) of each tensor that is not of experts nor of a draft layer."""
    count, names = model.config.get_text_config().num_hidden_layers, []
    for name in file.names:
        block, *_ = name.removeprefix("blk.").split(".") if name.startswith("blk.") else ("",)
        if not (block and int(block) >= count) and "_exps." not in name:
            names.append(name)
        if name.endswith(".scale") and "_exps." not in name:
            raise CheckpointError(
                f"{file.path}, tensor {shown(name)}: Transformers does not multiply by it; use the original checkpoint"
            )
    by_rules = _rules()
    if by_rules is not None and file.architecture in by_rules.GGUF_ARCHS:
        yield from _by_rules(file, model, by_rules.GGUF_ARCHS[file.architecture](model.config), names)
        return
    kind = by_table.TENSOR_PROCESSORS.get(file.architecture, by_table.TensorProcessor)
    processor = kind(config=model.config.to_dict())
    parameter_of = by_table.get_gguf_hf_weights_map(model, processor)
    for name in names:
        made = processor.process(
            weights=file.dequantize(name), name=name, tensor_key_mapping=parameter_of, parsed_parameters={"tensors": {}}
        )
        dense = made.weights if isinstance(made.weights, Tensor) else torch.from_numpy(made.weights.copy())
        yield name, parameter_of.get(made.name, ""), _cast(file, name, dense, model.dtype)


def _rules() -> Any:
    """What Transformers since 5.24 knows of some architectures: conversions as for other checkpoints."""
    try:
        return importlib.import_module("transformers.integrations.gguf")
    except ImportError:
        return None


def _by_rules(
    file: GgufFile, model: PreTrainedModel, rules: list, names: list[str]
) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter, converter, pattern in parameters_in(model, rules, names, model.state_dict().keys()):
        dense = torch.from_numpy(file.dequantize(name).copy())
        for operation in converter.operations if converter is not None else ():
            (dense,) = operation.convert({pattern: dense}, [pattern], [parameter]).values()
        yield name, parameter, _cast(file, name, dense, model.dtype)


def _cast(file: GgufFile, name: str, dense: Tensor, dtype: torch.dtype) -> Tensor:
    file.release(name)
    return dense if file.type(name) == "F32" else dense.to(dtype)
