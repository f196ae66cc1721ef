"""The architectures of GGUF files that Transformers does not read and of which some layers have no attention: a row
each."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.checkpoints.gguf_file import GgufFile
from coterie.errors import CheckpointError
from coterie.hf.gguf.family import (
    SIGMOID,
    Family,
    Settings,
    blocks,
    by_layer,
    halves,
    head_dim,
    rope,
    stated,
)
from coterie.hf.gguf.latent import JOINED_LATENT, LATENT, latent

FULL, LINEAR = "full_attention", "linear_attention"


def granite(file: GgufFile) -> Settings:
    return {
        "num_local_experts": stated(file, "expert_count"),
        "intermediate_size": stated(file, "expert_feed_forward_length", stated(file, "feed_forward_length")),
        "attention_multiplier": stated(file, "attention.scale", head_dim(file) ** -0.5),
        "embedding_multiplier": stated(file, "embedding_scale", 1.0),
        "residual_multiplier": stated(file, "residual_scale", 1.0),
        "logits_scaling": stated(file, "logit_scale", 1.0),
    }


def granite_shared(file: GgufFile) -> Settings:
    return granite(file) | {"shared_intermediate_size": stated(file, "expert_shared_feed_forward_length")}


def _granite_hybrid(file: GgufFile) -> Settings:
    """Whether positions are turned is in a key that is named for something else."""
    heads = by_layer(file, "attention.head_count_kv")
    return granite_shared(file) | {
        "num_key_value_heads": max(heads),
        "layer_types": [FULL if count else LINEAR for count in heads],
        "position_embedding_type": "rope" if stated(file, "rope.scaling.finetuned") else None,
        "mamba_n_heads": stated(file, "ssm.time_step_rank"),
        "mamba_d_head": stated(file, "ssm.inner_size") // stated(file, "ssm.time_step_rank"),
        "mamba_n_groups": stated(file, "ssm.group_count"),
        "mamba_d_state": stated(file, "ssm.state_size"),
        "mamba_d_conv": stated(file, "ssm.conv_kernel"),
        "mamba_expand": stated(file, "ssm.inner_size") // stated(file, "embedding_length"),
    }


def _jamba(file: GgufFile) -> Settings:
    heads = by_layer(file, "attention.head_count_kv")
    routers = [f"blk.{n}.ffn_gate_inp.weight" in file.names for n in range(len(heads))]
    attends, routes = _period(file, heads), _period(file, routers)
    return {
        "num_key_value_heads": max(heads),
        "attn_layer_period": attends[0],
        "attn_layer_offset": attends[1],
        "expert_layer_period": routes[0],
        "expert_layer_offset": routes[1],
        "intermediate_size": stated(file, "feed_forward_length"),
        "num_experts": stated(file, "expert_count"),
        "mamba_d_conv": stated(file, "ssm.conv_kernel"),
        "mamba_d_state": stated(file, "ssm.state_size"),
        "mamba_dt_rank": stated(file, "ssm.time_step_rank"),
        "mamba_expand": stated(file, "ssm.inner_size") // stated(file, "embedding_length"),
    }


def _period(file: GgufFile, of: list) -> tuple[int, int]:
    """Every how many layers there is one of a kind, and the first of them: `of` has something for those that are.
    Raises CheckpointError where that is not even."""
    found = [n for n, one in enumerate(of) if one]
    every = found[1] - found[0] if len(found) > 1 else len(of)
    if not found or found != list(range(found[0], len(of), every)):
        raise CheckpointError(f"{file.path}: layers {found} have attention or experts, expected every so many of them")
    return every, found[0]


def _kimi(file: GgufFile) -> Settings:
    """Heads of linear attention are as many as of the other; that scores are divided by their sum is a constant of the
    architecture."""
    heads, dense = by_layer(file, "attention.head_count_kv"), stated(file, "leading_dense_block_count", 0)
    return latent(file) | {
        "layer_types": [FULL if count else LINEAR for count in heads],
        "mlp_layer_types": ["dense" if n < dense else "sparse" for n in range(len(heads))],
        "intermediate_size": stated(file, "feed_forward_length"),
        "moe_intermediate_size": stated(file, "expert_feed_forward_length"),
        "num_experts": stated(file, "expert_count"),
        "num_shared_experts": stated(file, "expert_shared_count"),
        "routed_scaling_factor": stated(file, "expert_weights_scale", 1.0),
        "moe_renormalize": True,
        "num_expert_group": stated(file, "expert_group_count", 1),
        "topk_group": stated(file, "expert_group_used_count", 1),
        "linear_head_dim": stated(file, "kda.head_dim"),
        "linear_num_heads": stated(file, "attention.head_count"),
        "linear_conv_kernel_dim": stated(file, "ssm.conv_kernel"),
    }


def _lfm2(file: GgufFile) -> Settings:
    """That scores are divided by their sum is a constant of the architecture."""
    heads = by_layer(file, "attention.head_count_kv")
    return {
        "num_key_value_heads": max(heads),
        "layer_types": [FULL if count else "conv" for count in heads],
        "intermediate_size": stated(file, "feed_forward_length"),
        "moe_intermediate_size": stated(file, "expert_feed_forward_length"),
        "num_experts": stated(file, "expert_count"),
        "num_dense_layers": stated(file, "leading_dense_block_count", 0),
        "norm_topk_prob": True,
        "routed_scaling_factor": stated(file, "expert_weights_scale", 1.0),
        "conv_L_cache": stated(file, "shortconv.l_cache"),
        "norm_eps": stated(file, "attention.layer_norm_rms_epsilon"),
    }


def _nemotron(file: GgufFile) -> Settings:
    """A layer has attention, experts or neither, and is a Mamba layer then."""
    heads, widths = by_layer(file, "attention.head_count_kv"), by_layer(file, "feed_forward_length")
    return {
        "num_key_value_heads": max(heads),
        "layers_block_type": [
            FULL if count else "moe" if width else LINEAR for count, width in zip(heads, widths, strict=True)
        ],
        "head_dim": head_dim(file),
        "layer_norm_epsilon": stated(file, "attention.layer_norm_rms_epsilon"),
        "mamba_num_heads": stated(file, "ssm.time_step_rank"),
        "mamba_head_dim": stated(file, "ssm.inner_size") // stated(file, "ssm.time_step_rank"),
        "n_groups": stated(file, "ssm.group_count"),
        "ssm_state_size": stated(file, "ssm.state_size"),
        "conv_kernel": stated(file, "ssm.conv_kernel"),
        "n_routed_experts": stated(file, "expert_count"),
        "n_shared_experts": stated(file, "expert_shared_count"),
        "moe_intermediate_size": stated(file, "expert_feed_forward_length"),
        "moe_shared_expert_intermediate_size": stated(file, "expert_shared_feed_forward_length"),
        "moe_latent_size": stated(file, "moe_latent_size", None),
        "norm_topk_prob": stated(file, "expert_weights_norm", False),
        "routed_scaling_factor": stated(file, "expert_weights_scale", 1.0),
        "n_group": stated(file, "expert_group_count", 1),
        "topk_group": stated(file, "expert_group_used_count", 1),
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
        "layer_types": [LINEAR if (n + 1) % interval else FULL for n in range(count)],
        "rope_parameters": rope(file) | {"partial_rotary_factor": stated(file, "rope.dimension_count", head) / head},
    }


def _gates_by_head(file: GgufFile, qkv: Tensor, gate: Tensor) -> Tensor:
    """Queries, keys, values and gates of one key head after the other; they are stored kind by kind."""
    heads, width = stated(file, "ssm.group_count"), stated(file, "ssm.inner_size")
    keys = heads * stated(file, "ssm.state_size")
    kinds = *qkv.split([keys, keys, width]), gate
    return torch.cat([kind.unflatten(0, (heads, -1)) for kind in kinds], dim=1).flatten(0, 1)


def _gate_and_up(file: GgufFile, gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up])


def _kernels(file: GgufFile, *kernels: Tensor) -> Tensor:
    """Those of queries, keys and values, as one convolution has them."""
    return torch.cat([kernel.reshape(-1, 1, kernel.shape[-1]) for kernel in kernels])


def _less_one(file: GgufFile, value: Tensor) -> Tensor:
    return value - 1


def _flat(file: GgufFile, value: Tensor) -> Tensor:
    return value.flatten()


def _log(file: GgufFile, value: Tensor) -> Tensor:
    return (-value).log().flatten()


def _one_channel(file: GgufFile, value: Tensor) -> Tensor:
    """Kernels [channels, 1, width] of which each sees its own channel, stored without that 1."""
    return value[:, None]


PAIRS = {"attn_q.weight": halves("attention.head_count"), "attn_k.weight": halves("attention.head_count_kv")}
GRANITE = {
    "ffn_gate_inp": "block_sparse_moe.router", "ffn_gate_shexp": "shared_mlp.input_linear",
    "ffn_down_shexp": "shared_mlp.output_linear",
}  # fmt: skip
JOINED_GRANITE = {"ffn_gate_shexp.weight": (("ffn_up_shexp.weight",), _gate_and_up)}
JAMBA = {
    "output_norm": "model.final_layernorm", "ffn_norm": "pre_ff_layernorm", "ffn_gate_inp": "feed_forward.router",
    "ffn_gate": "feed_forward.gate_proj", "ffn_up": "feed_forward.up_proj", "ffn_down": "feed_forward.down_proj",
    "ssm_in": "mamba.in_proj", "ssm_conv1d": "mamba.conv1d", "ssm_x": "mamba.x_proj", "ssm_dt": "mamba.dt_proj",
    "ssm_dt_norm": "mamba.dt_layernorm", "ssm_b_norm": "mamba.b_layernorm", "ssm_c_norm": "mamba.c_layernorm",
    "ssm_a": "mamba.A_log", "ssm_d": "mamba.D", "ssm_out": "mamba.out_proj",
}  # fmt: skip
UNDONE_JAMBA = {"ssm_a": lambda file, value: (-value).log(), "ssm_conv1d.weight": _one_channel}
MAMBA = {
    "ssm_in": "in_proj", "ssm_conv1d": "conv1d", "ssm_dt.bias": "dt_bias", "ssm_a": "A_log", "ssm_d": "D",
    "ssm_norm": "norm", "ssm_out": "out_proj",
}  # fmt: skip
UNDONE_MAMBA = {"ssm_a": _log, "ssm_d": _flat, "ssm_norm.weight": _flat, "ssm_conv1d.weight": _one_channel}
NEMOTRON = {
    "token_embd": "model.embeddings", "output_norm": "model.norm_f", "attn_norm": "norm", "attn_q": "mixer.q_proj",
    "attn_k": "mixer.k_proj", "attn_v": "mixer.v_proj", "attn_output": "mixer.o_proj", "ffn_gate_inp": "mixer.gate",
    "exp_probs_b.bias": "mixer.gate.e_score_correction_bias", "ffn_up_shexp": "mixer.shared_experts.up_proj",
    "ffn_down_shexp": "mixer.shared_experts.down_proj", "ffn_latent_down": "mixer.fc1_latent_proj",
    "ffn_latent_up": "mixer.fc2_latent_proj",
}  # fmt: skip
LFM2 = {
    "token_embd_norm": "model.embedding_norm", "attn_norm": "operator_norm", "ffn_norm": "ffn_norm",
    "attn_output": "self_attn.out_proj", "attn_q_norm": "self_attn.q_layernorm", "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv", "shortconv.in_proj": "conv.in_proj", "shortconv.out_proj": "conv.out_proj",
    "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
    "ffn_gate_inp": "feed_forward.gate", "exp_probs_b.bias": "feed_forward.expert_bias",
}  # fmt: skip
KIMI = LATENT | {
    "ssm_conv1d_q": "self_attn.conv1d", "ssm_f_a": "self_attn.forget_gate.f_a_proj",
    "ssm_f_b": "self_attn.forget_gate.f_b_proj", "ssm_a": "self_attn.forget_gate.A_log",
    "ssm_dt.bias": "self_attn.forget_gate.dt_bias", "ssm_beta": "self_attn.b_proj", "ssm_g_a": "self_attn.g_a_proj",
    "ssm_g_b": "self_attn.g_b_proj", "ssm_norm": "self_attn.o_norm",
}  # fmt: skip
JOINED_KIMI = JOINED_LATENT | {"ssm_conv1d_q.weight": (("ssm_conv1d_k.weight", "ssm_conv1d_v.weight"), _kernels)}
QWEN3_NEXT = {
    "post_attention_norm": "post_attention_layernorm", "attn_qkv": "linear_attn.in_proj_qkvz",
    "ssm_in": "linear_attn.in_proj_qkvz", "ssm_ba": "linear_attn.in_proj_ba", "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm", "ssm_out": "linear_attn.out_proj", "ssm_a": "linear_attn.A_log",
    "ssm_dt.bias": "linear_attn.dt_bias", "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj", "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip
UNDONE_QWEN3_NEXT = {
    "ssm_a": _log, "ssm_conv1d.weight": _one_channel,
    "ffn_gate_inp_shexp.weight": lambda file, value: value.reshape(1, -1),
    "output_norm.weight": _less_one, "attn_norm.weight": _less_one, "post_attention_norm.weight": _less_one,
    "attn_q_norm.weight": _less_one, "attn_k_norm.weight": _less_one,
}  # fmt: skip
GRANITE_HYBRID = Family(
    "granitemoehybrid",
    _granite_hybrid,
    GRANITE | {tensor: f"mamba.{name}" for tensor, name in MAMBA.items()},
    PAIRS | UNDONE_MAMBA,
    JOINED_GRANITE,
)


def _granite_with_experts(file: GgufFile) -> Family | None:
    return GRANITE_HYBRID if file.own_value("expert_count") else None


HYBRIDS = {
    "granitehybrid": _granite_with_experts,
    "jamba": Family("jamba", _jamba, JAMBA, UNDONE_JAMBA),
    "kimi-linear": Family(
        "kimi_linear",
        _kimi,
        KIMI,
        {"ssm_a": lambda file, value: _log(file, value).view(1, 1, -1, 1)},
        JOINED_KIMI,
        SIGMOID,
    ),
    "lfm2moe": Family("lfm2_moe", _lfm2, LFM2, {"shortconv.conv.weight": _one_channel}, gating=SIGMOID),
    "nemotron_h_moe": Family(
        "nemotron_h",
        _nemotron,
        NEMOTRON | {tensor: f"mixer.{name}" for tensor, name in MAMBA.items()},
        UNDONE_MAMBA,
        gating=SIGMOID,
    ),
    "qwen3next": Family(
        "qwen3_next",
        _qwen3_next,
        QWEN3_NEXT,
        UNDONE_QWEN3_NEXT,
        {"attn_qkv.weight": (("attn_gate.weight",), _gates_by_head)},
    ),
}
