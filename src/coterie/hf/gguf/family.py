"""A model of a GGUF file whose architecture Transformers does not read: what config.json would say of it, and which
tensors are which parameters. What llama.cpp's converter did to a tensor is undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from coterie.checkpoints.gguf_file import GgufFile
from coterie.checkpoints.tensorfile import shown
from coterie.errors import CheckpointError, UnsupportedModelError

Settings = dict[str, Any]
SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3  # of expert_gating_func
NEEDED = object()
# Metadata that changes what a model computes, and that nothing here reads but where a family says so.
UNREAD = (
    "attention.sliding_window", "attention.clamp_kqv", "attention.temperature_scale", "attention.temperature_length",
    "attn_logit_softcapping", "final_logit_softcapping", "router_logit_softcapping", "swiglu_clamp_exp",
    "swiglu_clamp_shexp",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    settings: what config.json says beside what all say. names: tensors, without "blk.{L}.", and the parameters of a
    layer, or of the model, that they are, beside NAMES. undone: what takes back what the converter did to a tensor.
    joined: tensors that are one parameter with others, these, and what joins them. gating: how scores of experts are
    made. reads: what of UNREAD the settings read. in_settings: tensors that they are made of, which are no parameters.
    """

    model_type: str
    settings: Callable[[GgufFile], Settings]
    names: dict[str, str] = field(default_factory=dict)
    undone: dict[str, Callable[[GgufFile, Tensor], Tensor]] = field(default_factory=dict)
    joined: dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]] = field(default_factory=dict)
    gating: int = SOFTMAX
    reads: tuple[str, ...] = ()
    in_settings: tuple[str, ...] = ()


def settings_of(file: GgufFile, family: Family) -> Settings:
    """What config.json would say. Raises CheckpointError for metadata without what there must be, UnsupportedModelError
    for what changes the model in a way that is not read."""
    gating = stated(file, "expert_gating_func", family.gating)
    odd = [key for key in UNREAD if key not in family.reads and file.own_value(key)]
    odd += ["expert_gating_func"] if gating not in (0, family.gating) else []
    if odd:
        raise UnsupportedModelError(
            f"{file.path}: this version does not read {odd[0]} of {file.architecture}: use the original checkpoint"
        )
    heads, own = stated(file, "attention.head_count"), family.settings(file)
    return {
        "num_hidden_layers": blocks(file),
        "hidden_size": stated(file, "embedding_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": stated(file, "attention.head_count_kv", heads),
        "rms_norm_eps": stated(file, "attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": stated(file, "context_length"),
        "num_experts_per_tok": stated(file, "expert_used_count"),
        "vocab_size": file.shape("token_embd.weight")[0],
        "rope_parameters": own.pop("rope_parameters", None) or rope(file),
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id"),
        "pad_token_id": file.value("tokenizer.ggml.padding_token_id"),
        **own,
    }


def parameters(
    file: GgufFile, family: Family, tensors: list[str]
) -> Iterator[tuple[str, str, Callable[[Callable[[str], Tensor]], Tensor]]]:
    """(tensor, parameter, what makes it, given what reads a tensor in float32) of each of `tensors`; the parameter is
    "" where it is none."""
    names = NAMES | family.names
    no_own = {*family.in_settings, *(other for others, _ in family.joined.values() for other in others)}
    for name in tensors:
        stem, leaf, layer = "", name, ""
        if _in_a_layer(name):
            _, block, leaf = name.split(".", 2)
            stem, layer = f"blk.{block}.", f"model.layers.{block}."
        if leaf in no_own:
            continue
        base, _, suffix = leaf.rpartition(".")
        found = names.get(leaf) or (f"{names[base]}.{suffix}" if base in names else "")
        yield name, found and layer + found, partial(_made, file, family, name, stem, leaf)


def _in_a_layer(tensor: str) -> bool:
    return tensor.startswith("blk.") and tensor.count(".") > 1


def _made(
    file: GgufFile, family: Family, name: str, stem: str, leaf: str, value: Callable[[str], Tensor]
) -> Tensor:
    """A parameter. Raises CheckpointError for shapes that do not go with the metadata or each other."""
    found, undo, (others, join) = value(name), family.undone.get(leaf), family.joined.get(leaf, ((), None))
    try:
        found = undo(file, found) if undo else found
        return join(file, found, *(value(stem + other) for other in others)) if join else found
    except (RuntimeError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{file.path}, tensor {shown(name)}: its shape, {list(file.shape(name))}, does not go with the "
            f"metadata{f' or with {stem}{others[0]}' if others else ''}: {error}"
        ) from error


def stated(file: GgufFile, key: str, default: Any = NEEDED) -> Any:
    """A value of the architecture's own; of a float32 the shortest decimal that it is nearest to, as config.json had
    it. Raises CheckpointError where there is none, and no default."""
    value = file.own_value(key)
    if value is None and default is NEEDED:
        raise CheckpointError(f"{file.path}: the metadata has no {file.architecture}.{key}")
    if value is None:
        return default
    return float(str(np.float32(value))) if isinstance(value, float) else value


def blocks(file: GgufFile) -> int:
    """Layers of the model, without those that draft tokens."""
    return stated(file, "block_count") - stated(file, "nextn_predict_layers", 0)


def by_layer(file: GgufFile, key: str) -> list[Any]:
    """A value of each layer. Raises CheckpointError where the metadata has not one of each."""
    found, count = stated(file, key), blocks(file)
    if not isinstance(found, list) or len(found) < count:
        raise CheckpointError(
            f"{file.path}: {file.architecture}.{key} is {shown(found)}, expected a value of each of {count} layers"
        )
    return found[:count]


def head_dim(file: GgufFile) -> int:
    """Columns of a head of queries."""
    width, heads = stated(file, "embedding_length"), stated(file, "attention.head_count")
    return stated(file, "attention.key_length", width // heads)


def halves(heads: str) -> Callable[[GgufFile, Tensor], Tensor]:
    """Takes back that rows of a head that turn together are stored beside each other, as the first Llama had them.
    heads: what says how many there are, of all layers or of each."""

    def undo(file: GgufFile, value: Tensor) -> Tensor:
        count = stated(file, heads)
        count = max(count) if isinstance(count, list) else count
        return value.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)

    return undo


def rope(file: GgufFile, own: dict[str, str] | None = None, **more: Any) -> Settings:
    """The embeddings of positions. own: what is at "rope.scaling." beside YARN, and what Transformers calls it. more:
    what is said of those that are scaled.

    Raises UnsupportedModelError for what this version does not read.
    """
    known = YARN | (own or {})
    scaling = file.own_value("rope.scaling.type", "none")
    keys = [key.removeprefix("rope.scaling.") for key in file.own_keys("rope.scaling.")]
    unknown = [key for key in keys if key not in known and key not in IGNORED]
    if scaling not in ("none", "yarn") or unknown:
        what = f"rope.scaling.{unknown[0]}" if scaling in ("none", "yarn") else f"positions that are scaled ({scaling})"
        raise UnsupportedModelError(
            f"{file.path}: this version does not read {shown(what)} of {file.architecture}: use the original checkpoint"
        )
    found = {"rope_type": "default", "rope_theta": stated(file, "rope.freq_base", 10000.0)}
    if scaling == "yarn":
        found |= {"rope_type": scaling, "beta_fast": 32.0, "beta_slow": 1.0, **more}
    return found | {known[key]: stated(file, f"rope.scaling.{key}") for key in keys if key in known}


# What is at "rope.scaling." -> what Transformers calls it.
YARN = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
IGNORED = ("type", "finetuned")


# Tensors -> parameters.
NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate_inp": "mlp.gate",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj", "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj", "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
}  # fmt: skip
