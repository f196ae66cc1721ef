"""Gemma 4 with experts in GGUF files; without, Transformers reads it."""

from __future__ import annotations

from coterie.checkpoints.gguf_file import GgufFile
from coterie.checkpoints.tensorfile import shown
from coterie.errors import CheckpointError, UnsupportedModelError
from coterie.hf.gguf.family import Family, Settings, by_layer, rope, stated

FREQUENCIES = "rope_freqs.weight"
STILL = 1e30  # what the frequency of a pair that is not turned is divided by


def gemma4(file: GgufFile) -> Family | None:
    return GEMMA4 if file.own_value("expert_count") else None


def _gemma4(file: GgufFile) -> Settings:
    """Layers attend to a window or to all, with another width of heads, other positions and, perhaps, another number of
    keys. That scores are divided by their sum is a constant of the architecture."""
    for key, value in READ_ALONE.items():
        if stated(file, key, value) != value:
            raise UnsupportedModelError(
                f"{file.path}: this version does not read {key} of {file.architecture} with experts but as {value}: "
                "use the original checkpoint"
            )
    for key, other in SAME.items():
        if stated(file, key, stated(file, other)) != stated(file, other):
            raise UnsupportedModelError(
                f"{file.path}: {key} is {shown(stated(file, key))}, this version reads what {other} is, "
                f"{stated(file, other)}: use the original checkpoint"
            )
    windows = by_layer(file, "attention.sliding_window_pattern")
    if windows[-1]:  # which Transformers' model never does
        raise UnsupportedModelError(f"{file.path}: the last layer attends to a window, expected to all tokens")
    everywhere = [n for n, window in enumerate(windows) if not window]
    keys, keys_everywhere = _heads(file, windows)
    return {
        "head_dim": stated(file, "attention.key_length_swa"),
        "global_head_dim": stated(file, "attention.key_length"),
        "num_key_value_heads": keys,
        "num_global_key_value_heads": keys_everywhere,
        "attention_k_eq_v": all(f"blk.{n}.attn_v.weight" not in file.names for n in everywhere),
        "sliding_window": stated(file, "attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        # Files of models without a cap do not have the key, and llama.cpp caps at 30 then.
        "final_logit_softcapping": stated(file, "final_logit_softcapping") or None,
        "rope_parameters": _positions(file),
        "hidden_size_per_layer_input": 0,
        "intermediate_size": stated(file, "feed_forward_length"),
        "enable_moe_block": True,
        "num_experts": stated(file, "expert_count"),
        "top_k_experts": stated(file, "expert_used_count"),
        "moe_intermediate_size": stated(file, "expert_feed_forward_length"),
    }


def _heads(file: GgufFile, windows: list[bool]) -> tuple[int, int]:
    """Heads of keys in layers that attend to a window, and in the others. Raises CheckpointError where layers of a kind
    differ."""
    counts = stated(file, "attention.head_count_kv")
    if not isinstance(counts, list):
        return counts, counts
    counts = by_layer(file, "attention.head_count_kv")
    kinds = [{count for count, own in zip(counts, windows, strict=True) if bool(own) is kind} for kind in (True, False)]
    if any(len(kind) > 1 for kind in kinds):
        raise CheckpointError(
            f"{file.path}: attention.head_count_kv is {shown(counts)}, expected one number for a kind of layer"
        )
    (near,), (of_all,) = kinds[0] or kinds[1], kinds[1]
    return near, of_all


def _positions(file: GgufFile) -> Settings:
    """Layers that attend to all tokens turn the first pairs of a head alone: others have frequencies next to 0."""
    if rope(file)["rope_type"] != "default":
        raise UnsupportedModelError(
            f"{file.path}: this version does not read positions of {file.architecture} that are scaled: use the "
            "original checkpoint"
        )
    head = stated(file, "attention.key_length")
    factors = file.dequantize(FREQUENCIES)
    turned = int((factors == 1).sum())
    share = turned / len(factors)
    whole = factors.shape == (head // 2,) and int(share * head // 2) == turned  # as Transformers counts them
    if not (whole and (factors[:turned] == 1).all() and (factors[turned:] >= STILL).all()):
        raise UnsupportedModelError(
            f"{file.path}, tensor {FREQUENCIES}: expected {head // 2} factors, 1 of the first pairs of a head and "
            f"{STILL:g} of those that are not turned: use the original checkpoint"
        )
    return {
        "sliding_attention": {"rope_type": "default", "rope_theta": stated(file, "rope.freq_base_swa")},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": share,
            "rope_theta": stated(file, "rope.freq_base"),
        },
    }


# What the models with experts have: no layer takes another's keys, or has embeddings of its own.
READ_ALONE = {"attention.shared_kv_layers": 0, "embedding_length_per_layer_input": 0, "attention.causal": True}
SAME = {
    "attention.value_length": "attention.key_length", "attention.value_length_swa": "attention.key_length_swa",
    "rope.dimension_count": "attention.key_length", "rope.dimension_count_swa": "attention.key_length_swa",
}  # fmt: skip
NAMES = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "pre_ffw_norm_2": "pre_feedforward_layernorm_2", "post_ffw_norm": "post_feedforward_layernorm",
    "post_ffw_norm_1": "post_feedforward_layernorm_1", "post_ffw_norm_2": "post_feedforward_layernorm_2",
    "ffn_gate_inp.weight": "router.proj.weight", "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale", "layer_output_scale.weight": "layer_scalar",
}  # fmt: skip
GEMMA4 = Family(
    "gemma4_text",
    _gemma4,
    NAMES,
    reads=("attention.sliding_window", "final_logit_softcapping"),
    in_settings=(FREQUENCIES,),
)
