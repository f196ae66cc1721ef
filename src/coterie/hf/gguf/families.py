"""The architectures of GGUF files that Transformers does not read, a row each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from coterie.checkpoints.gguf_file import GgufFile
from coterie.errors import UnsupportedModelError
from coterie.hf.gguf.family import (
    SIGMOID,
    SOFTMAX,
    SOFTMAX_OF_CHOSEN,
    Family,
    Settings,
    blocks,
    head_dim,
    rope,
    stated,
)


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


def _granite(file: GgufFile) -> Settings:
    return {
        "num_local_experts": stated(file, "expert_count"),
        "intermediate_size": stated(file, "expert_feed_forward_length", stated(file, "feed_forward_length")),
        "attention_multiplier": stated(file, "attention.scale", head_dim(file) ** -0.5),
        "embedding_multiplier": stated(file, "embedding_scale", 1.0),
        "residual_multiplier": stated(file, "residual_scale", 1.0),
        "logits_scaling": stated(file, "logit_scale", 1.0),
    }


def _routed(file: GgufFile) -> Settings:
    """What models with shared experts beside those that are chosen, and dense layers before, say of them."""
    groups, used = GROUPS.get((file.architecture, stated(file, "expert_count")), (1, 1))
    return {
        "intermediate_size": stated(file, "feed_forward_length"),
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
    turned, latent = stated(file, "rope.dimension_count"), stated(file, "attention.kv_lora_rank")
    key = stated(file, "attention.key_length_mla", stated(file, "attention.key_length"))
    own = {"yarn_log_multiplier": "mscale_all_dim"}
    positions = rope(file, own)
    if "mscale_all_dim" in positions:  # a tenth of it is stored; the published models have the same of either kind
        positions["mscale_all_dim"] = positions["mscale"] = round(10 * positions["mscale_all_dim"], 6)
    return _routed(file) | {
        "num_key_value_heads": stated(file, "attention.head_count"),
        "q_lora_rank": stated(file, "attention.q_lora_rank", None),
        "kv_lora_rank": latent,
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key - turned,
        "v_head_dim": stated(file, "attention.value_length_mla", stated(file, "attention.value_length")),
        "rope_parameters": positions,
    }


def _deepseek_v2(file: GgufFile) -> Settings:
    found = _deepseek(file)
    if found["norm_topk_prob"]:  # which Transformers' model does not do
        raise UnsupportedModelError(
            f"{file.path}: this version does not read expert_weights_norm of {file.architecture} where scores are made "
            "by softmax: use the original checkpoint"
        )
    return found | {"topk_method": "group_limited_greedy" if found["n_group"] > 1 else "greedy"}


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


def _qwen3_next(file: GgufFile) -> Settings:
    head, values = head_dim(file), stated(file, "ssm.time_step_rank")
    interval, count = stated(file, "full_attention_interval", 4), blocks(file)
    return {
        "head_dim": head,
        "num_experts": stated(file, "expert_count"),
        "moe_intermediate_size": stated(file, "expert_feed_forward_length"),
        "shared_expert_intermediate_size": stated(file, "expert_shared_feed_forward_length"),
        "norm_topk_prob": stated(file, "expert_weights_norm", True),
        "linear_conv_kernel_dim": stated(file, "ssm.conv_kernel"),
        "linear_key_head_dim": stated(file, "ssm.state_size"),
        "linear_num_key_heads": stated(file, "ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_value_head_dim": stated(file, "ssm.inner_size") // values,
        "layer_types": ["linear_attention" if (n + 1) % interval else "full_attention" for n in range(count)],
        "rope_parameters": rope(file) | {"partial_rotary_factor": stated(file, "rope.dimension_count", head) / head},
    }


def _halves(heads: str) -> Callable[[GgufFile, Tensor], Tensor]:
    """Rows of a head that turn together are stored beside each other, as the first Llama had them."""

    def undo(file: GgufFile, value: Tensor) -> Tensor:
        return value.unflatten(0, (stated(file, heads), -1, 2)).transpose(1, 2).flatten(0, 2)

    return undo


def _keys_and_values(file: GgufFile, keys: Tensor, values: Tensor) -> Tensor:
    """The matrix that makes keys and values of what is cached of a token, a head after the other; that of keys is
    stored transposed."""
    return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)


def _gates_by_head(file: GgufFile, qkv: Tensor, gate: Tensor) -> Tensor:
    """Queries, keys, values and gates of one key head after the other; they are stored kind by kind."""
    heads, width = stated(file, "ssm.group_count"), stated(file, "ssm.inner_size")
    keys = heads * stated(file, "ssm.state_size")
    kinds = *qkv.split([keys, keys, width]), gate
    return torch.cat([kind.unflatten(0, (heads, -1)) for kind in kinds], dim=1).flatten(0, 1)


def _less_one(file: GgufFile, value: Tensor) -> Tensor:
    return value - 1


# Groups that experts are chosen from, and how many of them a token takes, of models by their number of experts: older
# files do not say so, and llama.cpp chooses among all experts of such.
GROUPS = {("deepseek2", 256): (8, 4), ("deepseek2", 160): (8, 3)}
LATENT = {
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj", "attn_k_b": "self_attn.kv_b_proj",
}  # fmt: skip
JOINED_LATENT = {"attn_k_b.weight": ("attn_v_b.weight", _keys_and_values)}
PAIRS = {"attn_q.weight": _halves("attention.head_count"), "attn_k.weight": _halves("attention.head_count_kv")}
HUNYUAN = {
    "attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm", "ffn_gate_inp": "mlp.gate.wg",
    "ffn_gate_shexp": "mlp.shared_mlp.gate_proj", "ffn_up_shexp": "mlp.shared_mlp.up_proj",
    "ffn_down_shexp": "mlp.shared_mlp.down_proj",
}  # fmt: skip

GPT_OSS = {
    "post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router",
    "attn_sinks.weight": "self_attn.sinks",
}  # fmt: skip
QWEN3_NEXT = {
    "post_attention_norm": "post_attention_layernorm", "attn_qkv": "linear_attn.in_proj_qkvz",
    "ssm_in": "linear_attn.in_proj_qkvz", "ssm_ba": "linear_attn.in_proj_ba", "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm", "ssm_out": "linear_attn.out_proj", "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
UNDONE_QWEN3_NEXT = {
    "ssm_a": lambda file, value: (-value).log(), "ssm_conv1d.weight": lambda file, value: value[:, None],
    "ffn_gate_inp_shexp.weight": lambda file, value: value.reshape(1, -1),
    "output_norm.weight": _less_one, "attn_norm.weight": _less_one, "post_attention_norm.weight": _less_one,
    "attn_q_norm.weight": _less_one, "attn_k_norm.weight": _less_one,
}  # fmt: skip
MIXTRAL = Family("mixtral", _mixtral, undone=PAIRS)
DEEPSEEK_V2 = Family("deepseek_v2", _deepseek_v2, LATENT, joined=JOINED_LATENT)
DEEPSEEK_V3 = Family("deepseek_v3", _deepseek, LATENT, joined=JOINED_LATENT, gating=SIGMOID)


def _llama_with_experts(file: GgufFile) -> Family | None:
    return MIXTRAL if file.own_value("expert_count") else None


def _either_deepseek(file: GgufFile) -> Family:
    return DEEPSEEK_V3 if file.own_value("expert_gating_func", SOFTMAX) == SIGMOID else DEEPSEEK_V2


# By the architecture's name: a family, or what tells which one a file has.
FAMILIES: dict[str, Family | Callable[[GgufFile], Family | None]] = {
    "gpt-oss": Family("gpt_oss", _gpt_oss, GPT_OSS, gating=SOFTMAX_OF_CHOSEN, reads="attention.sliding_window"),
    "llama": _llama_with_experts,
    "olmoe": Family("olmoe", _olmoe, reads="attention.clamp_kqv"),
    "granitemoe": Family("granitemoe", _granite, {"ffn_gate_inp": "block_sparse_moe.router"}, PAIRS),
    "glm4moe": Family("glm4_moe", _glm4, {"post_attention_norm": "post_attention_layernorm"}, gating=SIGMOID),
    "deepseek2": _either_deepseek,
    "ernie4_5-moe": Family(
        "ernie4_5_moe",
        _ernie,
        {"exp_probs_b.bias": "mlp.gate.moe_statics.e_score_correction_bias"},
        {"exp_probs_b.bias": lambda file, value: value.reshape(1, -1)},
    ),
    "qwen3next": Family(
        "qwen3_next",
        _qwen3_next,
        QWEN3_NEXT,
        UNDONE_QWEN3_NEXT,
        {"attn_qkv.weight": ("attn_gate.weight", _gates_by_head)},
    ),
    "hunyuan-moe": Family("hunyuan_v1_moe", _hunyuan, HUNYUAN),
}
