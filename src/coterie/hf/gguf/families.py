"""The architectures of GGUF files that Transformers does not read, a row each."""

from __future__ import annotations

from collections.abc import Callable

from coterie.checkpoints.gguf_file import GgufFile
from coterie.errors import CheckpointError, UnsupportedModelError
from coterie.hf.gguf.family import (
    SIGMOID,
    SOFTMAX_OF_CHOSEN,
    Family,
    Settings,
    blocks,
    by_layer,
    head_dim,
    rope,
    stated,
)
from coterie.hf.gguf.gemma import gemma4
from coterie.hf.gguf.hybrids import GRANITE, HYBRIDS, JOINED_GRANITE, PAIRS, granite, granite_shared
from coterie.hf.gguf.latent import JOINED_LATENT, LATENT, latent


def family_of(file: GgufFile) -> Family | None:
    """That of a file; None where Transformers reads it."""
    found = FAMILIES.get(file.architecture)
    return found(file) if callable(found) else found


def _gpt_oss(file: GgufFile) -> Settings:
    """The clamp and the slope of its experts are constants of the architecture, and so is that every other layer,
    beginning with the first, attends to a window."""
    return {
        "intermediate_size": stated(file, "expert_feed_forward_length"),
        "head_dim": stated(file, "attention.key_length"),
        "sliding_window": stated(file, "attention.sliding_window"),
        "num_local_experts": stated(file, "expert_count"),
        # Files do not say that the ends of the ramp are no whole numbers, as those of the published models are not.
        "rope_parameters": rope(file, truncate=False),
    }


def _mixtral(file: GgufFile) -> Settings:
    return {
        "num_local_experts": stated(file, "expert_count"),
        "intermediate_size": stated(file, "expert_feed_forward_length", stated(file, "feed_forward_length")),
        "head_dim": stated(file, "attention.key_length", None),
        "sliding_window": None,
    }


def _olmoe(file: GgufFile) -> Settings:
    return {
        "num_experts": stated(file, "expert_count"),
        "intermediate_size": stated(file, "expert_feed_forward_length", stated(file, "feed_forward_length")),
        "norm_topk_prob": stated(file, "expert_weights_norm", False),
        "clip_qkv": stated(file, "attention.clamp_kqv", None),
    }


def _dots(file: GgufFile) -> Settings:
    return _routed(file) | {
        "head_dim": head_dim(file),
        "attention_bias": "blk.0.attn_q.bias" in file.names,
        "sliding_window": None,
    }


def _exaone(file: GgufFile) -> Settings:
    """Positions are turned where attention is to a window: a constant of the architecture."""
    windows, found = by_layer(file, "attention.sliding_window_pattern"), _routed(file)
    found |= {"num_experts": found.pop("n_routed_experts"), "num_shared_experts": found.pop("n_shared_experts")}
    return found | {
        "head_dim": head_dim(file),
        "sliding_window": stated(file, "attention.sliding_window"),
        "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
    }


def _afmoe(file: GgufFile) -> Settings:
    """That embeddings are multiplied, that positions are turned where attention is to a window, and which layers these
    are, are constants of the architecture."""
    if not stated(file, "expert_weights_norm"):  # which Transformers' model always does
        raise UnsupportedModelError(
            f"{file.path}: this version does not read expert_weights_norm of {file.architecture} that is false: use "
            "the original checkpoint"
        )
    return {
        "intermediate_size": stated(file, "feed_forward_length"),
        "moe_intermediate_size": stated(file, "expert_feed_forward_length"),
        "num_experts": stated(file, "expert_count"),
        "num_shared_experts": stated(file, "expert_shared_count"),
        "num_dense_layers": stated(file, "leading_dense_block_count", 0),
        "route_scale": stated(file, "expert_weights_scale", 1.0),
        "head_dim": head_dim(file),
        "sliding_window": stated(file, "attention.sliding_window"),
        "global_attn_every_n_layers": stated(file, "attention.sliding_window_pattern", 4),
        "mup_enabled": True,
    }


def _routed(file: GgufFile) -> Settings:
    """What models with shared experts beside those that are chosen, and dense layers before, say of them."""
    groups, used = GROUPS.get((file.architecture, stated(file, "expert_count")), (1, 1))
    return {
        "intermediate_size": stated(file, "feed_forward_length", stated(file, "expert_feed_forward_length")),
        "moe_intermediate_size": stated(file, "expert_feed_forward_length"),
        "n_routed_experts": stated(file, "expert_count"),
        "n_shared_experts": stated(file, "expert_shared_count"),
        "first_k_dense_replace": stated(file, "leading_dense_block_count", 0),
        "routed_scaling_factor": stated(file, "expert_weights_scale", 1.0),
        "norm_topk_prob": stated(file, "expert_weights_norm", False),
        "n_group": stated(file, "expert_group_count", groups),
        "topk_group": stated(file, "expert_group_used_count", used),
    }


def _glm4(file: GgufFile) -> Settings:
    head = head_dim(file)
    return _routed(file) | {
        "head_dim": head,
        "attention_bias": "blk.0.attn_q.bias" in file.names,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in file.names,
        "rope_parameters": rope(file) | {"partial_rotary_factor": stated(file, "rope.dimension_count", head) / head},
    }


def _deepseek(file: GgufFile) -> Settings:
    positions = rope(file, {"yarn_log_multiplier": "mscale_all_dim"})
    if "mscale_all_dim" in positions:  # a tenth of it is stored; the published models have the same of either kind
        positions["mscale_all_dim"] = positions["mscale"] = round(10 * positions["mscale_all_dim"], 6)
    return _routed(file) | latent(file) | {"rope_parameters": positions}


def _deepseek_v2(file: GgufFile) -> Settings:
    found = _deepseek(file)
    if found["norm_topk_prob"]:  # which Transformers' model does not do
        raise UnsupportedModelError(
            f"{file.path}: this version does not read expert_weights_norm of {file.architecture} where scores are made "
            "by softmax: use the original checkpoint"
        )
    return found | {"topk_method": "group_limited_greedy" if found["n_group"] > 1 else "greedy"}


def _qwen3_vl(file: GgufFile) -> Settings:
    """The language model alone. The three positions of a token of text are one, so that it is a Qwen3-MoE; that scores
    are divided by their sum is a constant of the architecture."""
    return {
        "intermediate_size": stated(file, "feed_forward_length"),
        "moe_intermediate_size": stated(file, "expert_feed_forward_length"),
        "num_experts": stated(file, "expert_count"),
        "norm_topk_prob": True,
        "head_dim": head_dim(file),
    }


def _glm_dsa(file: GgufFile) -> Settings:
    """Layers without what chooses the tokens to attend to take the choice of the layer before."""
    choosing = [f"blk.{n}.indexer.attn_k.weight" in file.names for n in range(blocks(file))]
    if stated(file, "attention.indexer.types", None) is not None:
        choosing = by_layer(file, "attention.indexer.types")
    elif all(choosing) and stated(file, "context_length") >= LONG:
        raise CheckpointError(
            f"{file.path}: the metadata has no {file.architecture}.attention.indexer.types, and every layer has an "
            "indexer: which of them choose?"
        )
    found = _routed(file) | latent(file)
    return found | {
        "index_n_heads": stated(file, "attention.indexer.head_count"),
        "index_head_dim": stated(file, "attention.indexer.key_length"),
        "index_topk": stated(file, "attention.indexer.top_k"),
        "indexer_types": ["full" if chooses else "shared" for chooses in choosing],
    }


def _ernie(file: GgufFile) -> Settings:
    return {
        "intermediate_size": stated(file, "feed_forward_length"),
        "moe_intermediate_size": stated(file, "expert_feed_forward_length"),
        "moe_num_experts": stated(file, "expert_count"),
        "moe_k": stated(file, "expert_used_count"),
        "moe_num_shared_experts": stated(file, "expert_shared_count"),
        "moe_layer_start_index": stated(file, "leading_dense_block_count", 0),
        "moe_layer_interval": stated(file, "interleave_moe_layer_step", 1),
        "head_dim": stated(file, "attention.key_length", None),
    }


def _hunyuan(file: GgufFile) -> Settings:
    return {
        "intermediate_size": stated(file, "expert_feed_forward_length", stated(file, "feed_forward_length")),
        "num_experts": stated(file, "expert_count"),
        "moe_topk": stated(file, "expert_used_count"),
        "head_dim": head_dim(file),
    }


# Groups that experts are chosen from, and how many of them a token takes, of models by their number of experts: older
# files do not say so, and llama.cpp chooses among all experts of such.
GROUPS = {("deepseek2", 256): (8, 4), ("deepseek2", 160): (8, 3)}
# The context of GLM-5.2, not all of whose layers choose tokens; all of those before it do.
LONG = 1 << 20
GLM_DSA = LATENT | {
    "indexer.k_norm": "self_attn.indexer.k_norm", "indexer.proj": "self_attn.indexer.weights_proj",
    "indexer.attn_k": "self_attn.indexer.wk", "indexer.attn_q_b": "self_attn.indexer.wq_b",
}  # fmt: skip
HUNYUAN = {
    "attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm", "ffn_gate_inp": "mlp.gate.wg",
    "ffn_gate_shexp": "mlp.shared_mlp.gate_proj", "ffn_up_shexp": "mlp.shared_mlp.up_proj",
    "ffn_down_shexp": "mlp.shared_mlp.down_proj",
}  # fmt: skip

GPT_OSS = {
    "post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router",
    "attn_sinks.weight": "self_attn.sinks",
}  # fmt: skip
AFMOE = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_mlp_layernorm",
    "post_ffw_norm": "post_mlp_layernorm", "attn_gate": "self_attn.gate_proj", "ffn_gate_inp": "mlp.router.gate",
    "exp_probs_b.bias": "mlp.expert_bias",
}  # fmt: skip
MIXTRAL = Family("mixtral", _mixtral, undone=PAIRS)
GRANITE_MOE = Family("granitemoe", granite, GRANITE, PAIRS)
GRANITE_SHARED = Family("granitemoeshared", granite_shared, GRANITE, PAIRS, JOINED_GRANITE)
DEEPSEEK_V2 = Family("deepseek_v2", _deepseek_v2, LATENT, joined=JOINED_LATENT)
DEEPSEEK_V3 = Family("deepseek_v3", _deepseek, LATENT, joined=JOINED_LATENT, gating=SIGMOID)


def _llama_with_experts(file: GgufFile) -> Family | None:
    return MIXTRAL if file.own_value("expert_count") else None


def _either_granite(file: GgufFile) -> Family:
    return GRANITE_SHARED if file.own_value("expert_shared_feed_forward_length") else GRANITE_MOE


def _either_deepseek(file: GgufFile) -> Family:
    """By how scores are made. Files of GLM-4.7-Flash, which is a DeepSeek-V3, do not say it: they have what is added to
    scores, which DeepSeek-V2 has not."""
    if gating := file.own_value("expert_gating_func"):
        return DEEPSEEK_V3 if gating == SIGMOID else DEEPSEEK_V2
    return DEEPSEEK_V3 if any(".exp_probs_b" in name for name in file.names) else DEEPSEEK_V2


# By the architecture's name: a family, or what tells which one a file has.
FAMILIES: dict[str, Family | Callable[[GgufFile], Family | None]] = {
    "gpt-oss": Family("gpt_oss", _gpt_oss, GPT_OSS, gating=SOFTMAX_OF_CHOSEN, reads=("attention.sliding_window",)),
    "llama": _llama_with_experts,
    "olmoe": Family("olmoe", _olmoe, reads=("attention.clamp_kqv",)),
    "granitemoe": _either_granite,
    "glm4moe": Family("glm4_moe", _glm4, {"post_attention_norm": "post_attention_layernorm"}, gating=SIGMOID),
    "glm-dsa": Family("glm_moe_dsa", _glm_dsa, GLM_DSA, joined=JOINED_LATENT, gating=SIGMOID),
    "deepseek2": _either_deepseek,
    "ernie4_5-moe": Family(
        "ernie4_5_moe",
        _ernie,
        {"exp_probs_b.bias": "mlp.gate.moe_statics.e_score_correction_bias"},
        {"exp_probs_b.bias": lambda file, value: value.reshape(1, -1)},
    ),
    "hunyuan-moe": Family("hunyuan_v1_moe", _hunyuan, HUNYUAN),
    "qwen3vlmoe": Family("qwen3_moe", _qwen3_vl),
    "dots1": Family("dots1", _dots, gating=SIGMOID),
    "exaone-moe": Family("exaone_moe", _exaone, gating=SIGMOID, reads=("attention.sliding_window",)),
    "afmoe": Family("afmoe", _afmoe, AFMOE, gating=SIGMOID, reads=("attention.sliding_window",)),
    "gemma4": gemma4,
    **HYBRIDS,
}
