"""The config and the tokenizer of a GGUF file, made of its metadata: by Transformers, or here where that does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast

from coterie.checkpoints.gguf_file import GgufFile
from coterie.checkpoints.tensorfile import shown
from coterie.errors import CheckpointError, UnsupportedModelError

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
# What is at "rope.scaling." of an architecture that is read here -> what Transformers calls it.
SCALING = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
IGNORED_SCALING = ("type", "finetuned")


def read_config(file: GgufFile, **settings: Any) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config that a file's metadata makes, changed by those of `settings` that are its own, and the other ones.

    Raises UnsupportedModelError, naming the architecture, where neither Transformers nor this version makes one.
    """
    _check_blocks(file)
    if file.architecture in OWN:
        model_type, made = OWN[file.architecture]
        values = made(file)
        try:
            config, unused = CONFIG_MAPPING[model_type].from_dict(values, return_unused_kwargs=True, **settings)
        except Exception as error:  # Transformers' own checks of the values, which have no common type
            raise CheckpointError(f"{file.path}: the metadata is no valid {model_type} config: {error}") from error
    else:
        config, unused = _by_transformers(file, settings)
    config.tie_word_embeddings = "output.weight" not in file.names  # which may be in another file than the metadata
    config.dtype = config.dtype or torch.bfloat16
    return config, unused


def _by_transformers(file: GgufFile, settings: dict[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    if file.architecture == "llama" and file.own_value("expert_count"):
        raise UnsupportedModelError(
            f"{file.path}: GGUF architecture 'llama' with experts, a Mixtral, which Transformers takes for a Llama "
            "without them: use the original checkpoint, or Experts.open for a layer"
        )
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
    except OSError as error:
        raise CheckpointError(f"{first}: Transformers does not read its metadata: {shown(str(error))}") from error
    unused.pop("gguf_file", None)
    for key, name in FIELDS.items():
        value = file.own_value(key)
        if value is not None and hasattr(config, name) and name not in settings:
            setattr(config, name, value)
    return config, unused


def open_tokenizer(file: GgufFile) -> Any:
    """The tokenizer of a file. Raises CheckpointError where there is none, or none that Transformers can make."""
    first = file.first
    if file.value("tokenizer.ggml.model") is None:
        raise CheckpointError(f"{first} has no tokenizer: expected tokenizer.ggml.model and what goes with it")
    _check_blocks(file)
    maker = PreTrainedTokenizerFast if file.architecture in OWN else AutoTokenizer  # which reads the config first
    try:
        return maker.from_pretrained(first.parent, gguf_file=first.name)
    except Exception as error:  # tokenizers fail in as many ways as there are kinds
        raise CheckpointError(f"{first}: Transformers makes no tokenizer of it: {shown(str(error))}") from error


def save_tokenizer(file: GgufFile, folder: str | os.PathLike) -> None:
    """Writes the tokenizer of a file, where it has one, into `folder`."""
    if file.value("tokenizer.ggml.model") is not None:
        open_tokenizer(file).save_pretrained(folder)


def _gpt_oss(file: GgufFile) -> dict[str, Any]:
    """What config.json says of such a model. The clamp and the slope of its experts are constants of the architecture,
    and so is that every other layer, beginning with the first, attends to a window."""
    scaling = file.own_value("rope.scaling.type", "none")
    rope = {"rope_type": "default" if scaling == "none" else scaling, "rope_theta": _stated(file, "rope.freq_base")}
    if scaling == "yarn":
        # Files do not say that the ends of the ramp are no whole numbers, as those of the published models are not.
        rope |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
    keys = [key.removeprefix("rope.scaling.") for key in file.own_keys("rope.scaling.")]
    if scaling not in ("none", "yarn") or (unknown := [key for key in keys if key not in (*SCALING, *IGNORED_SCALING)]):
        what = f"rope.scaling.{unknown[0]}" if scaling in ("none", "yarn") else f"positions that are scaled ({scaling})"
        raise UnsupportedModelError(
            f"{file.path}: this version does not read {shown(what)} of {file.architecture}: use the original checkpoint"
        )
    rope |= {SCALING[key]: _stated(file, f"rope.scaling.{key}") for key in keys if key in SCALING}
    return {
        "num_hidden_layers": _stated(file, "block_count"),
        "hidden_size": _stated(file, "embedding_length"),
        "intermediate_size": _stated(file, "expert_feed_forward_length"),
        "num_attention_heads": _stated(file, "attention.head_count"),
        "num_key_value_heads": _stated(file, "attention.head_count_kv"),
        "head_dim": _stated(file, "attention.key_length"),
        "sliding_window": _stated(file, "attention.sliding_window"),
        "rms_norm_eps": _stated(file, "attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": _stated(file, "context_length"),
        "num_local_experts": _stated(file, "expert_count"),
        "num_experts_per_tok": _stated(file, "expert_used_count"),
        "vocab_size": file.shape("token_embd.weight")[0],
        "rope_parameters": rope,
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.value("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.value("tokenizer.ggml.padding_token_id"),
    }


def _check_blocks(file: GgufFile) -> None:
    """Raises CheckpointError for more layers than a file can hold: configs have lists of as many."""
    blocks = file.own_value("block_count", 0)
    if not isinstance(blocks, int) or blocks > len(file.names):
        raise CheckpointError(f"{file.path}: {shown(blocks)} layers (block_count), and {len(file.names)} tensors")


def _stated(file: GgufFile, key: str) -> Any:
    """A value of the architecture's own; of a float32 the shortest decimal that it is nearest to, as config.json had
    it. Raises CheckpointError where there is none."""
    value = file.own_value(key)
    if value is None:
        raise CheckpointError(f"{file.path}: the metadata has no {file.architecture}.{key}")
    return float(str(np.float32(value))) if isinstance(value, float) else value


# Architectures whose metadata Transformers misreads: model_type, and what config.json would say.
OWN: dict[str, tuple[str, Callable[[GgufFile], dict[str, Any]]]] = {"gpt-oss": ("gpt_oss", _gpt_oss)}
