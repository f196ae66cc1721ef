"""Models of Transformers as GGUF, as llama.cpp's converter writes them: by the gguf package's names."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf_models import TOKENS, write_gguf
from torch import Tensor

ARCHITECTURES = {
    "mixtral": "llama", "olmoe": "olmoe", "granitemoe": "granitemoe", "glm4_moe": "glm4moe", "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2", "ernie4_5_moe": "ernie4_5-moe", "hunyuan_v1_moe": "hunyuan-moe",
    "qwen3_next": "qwen3next",
}  # fmt: skip
PAIRS = ("mixtral", "granitemoe")  # rows of q and k that turn together are stored beside each other


def write_family(path: Path, model, split_latent: bool = True, more: dict | None = None) -> Path:
    """All numbers of a model in float32. split_latent: keys' and values' matrices apart, as written since 2025."""
    config, tensors = model.config, {}
    arch = ARCHITECTURES[config.model_type]
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        stem = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        for found, part in _parts(name, value.detach().float(), config, stem, names, split_latent).items():
            tensors[found] = np.ascontiguousarray(part.numpy()), "F32"
    metadata = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "vocab_size": config.vocab_size,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0,
        **OWN[config.model_type](config), **(more or {}),
    }  # fmt: skip
    return write_gguf(path, tensors, {key: value for key, value in metadata.items() if value is not None}, arch)


def _parts(name: str, value: Tensor, config, stem: str, names, split_latent: bool) -> dict[str, Tensor]:
    """What a parameter is in a file."""
    base, _, suffix = name.rpartition(".")
    if suffix == "gate_up_proj":
        gate, up = value.chunk(2, 1)
        return {f"{stem}ffn_gate_exps.weight": gate, f"{stem}ffn_up_exps.weight": up}
    if suffix == "down_proj":
        return {f"{stem}ffn_down_exps.weight": value}
    if suffix == "e_score_correction_bias":
        return {f"{stem}exp_probs_b.bias": value}
    if base.endswith("kv_b_proj") and split_latent:
        both = value.unflatten(0, (config.num_attention_heads, -1))
        keys, values = both.split([config.qk_nope_head_dim, config.v_head_dim], 1)
        return {f"{stem}attn_k_b.weight": keys.transpose(1, 2), f"{stem}attn_v_b.weight": values}
    if config.model_type == "qwen3_next":
        if base.endswith("in_proj_qkvz"):
            keys, values = config.linear_key_head_dim, config.linear_value_head_dim
            values *= config.linear_num_value_heads // config.linear_num_key_heads
            by_head = value.unflatten(0, (config.linear_num_key_heads, -1)).split([keys, keys, values, values], 1)
            q, k, v, z = (part.flatten(0, 1) for part in by_head)
            return {f"{stem}attn_qkv.weight": torch.cat([q, k, v]), f"{stem}attn_gate.weight": z}
        if suffix == "dt_bias":
            return {f"{stem}ssm_dt.bias": value}
        if suffix == "A_log":
            return {f"{stem}ssm_a": -value.exp()}
        value = value.squeeze() if "conv1d" in base or "shared_expert_gate" in base else value
        value = value + 1 if base.endswith("norm") and not base.endswith("linear_attn.norm") else value
    if config.model_type in PAIRS and base.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads
        value = value.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    found = names.get_name(base) or names.get_name(
        base.replace("block_sparse_moe.router", "block_sparse_moe.router.layer")
    )
    assert found, name
    return {f"{found}.{suffix}": value}


def _head(config) -> dict:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head}


def _experts(config, count: int, used: int | None = None) -> dict:
    return {"expert_count": count, "expert_used_count": used or config.num_experts_per_tok}


def _routed(config, gating: int) -> dict:
    return _experts(config, config.n_routed_experts) | {
        "expert_feed_forward_length": config.moe_intermediate_size, "expert_shared_count": config.n_shared_experts,
        "leading_dense_block_count": config.first_k_dense_replace, "expert_gating_func": gating,
        "expert_weights_scale": float(config.routed_scaling_factor), "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_group_count": config.n_group, "expert_group_used_count": config.topk_group,
    }  # fmt: skip


def _glm4(config) -> dict:
    turned = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1))
    return _routed(config, 2) | _head(config) | {"rope.dimension_count": turned}


def _granite(config) -> dict:
    return _experts(config, config.num_local_experts) | _head(config) | {
        "attention.scale": float(config.attention_multiplier), "embedding_scale": float(config.embedding_multiplier),
        "residual_scale": float(config.residual_multiplier), "logit_scale": float(config.logits_scaling),
    }  # fmt: skip


def _deepseek(config) -> dict:
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    return _routed(config, 2 if config.model_type == "deepseek_v3" else 1) | {
        "attention.head_count_kv": 1, "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank, "rope.dimension_count": config.qk_rope_head_dim,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": key, "attention.value_length_mla": config.v_head_dim,
    }  # fmt: skip


def _ernie(config) -> dict:
    return _experts(config, config.moe_num_experts, config.moe_k) | _head(config) | {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.moe_intermediate_size * config.moe_num_shared_experts,
        "expert_shared_count": config.moe_num_shared_experts, "leading_dense_block_count": config.moe_layer_start_index,
        "interleave_moe_layer_step": config.moe_layer_interval,
    }  # fmt: skip


def _hunyuan(config) -> dict:
    return _experts(config, config.num_experts, 2) | _head(config) | {
        "expert_feed_forward_length": config.intermediate_size, "expert_shared_count": 1,
        "expert_shared_feed_forward_length": config.intermediate_size,
    }  # fmt: skip


def _qwen3_next(config) -> dict:
    return _experts(config, config.num_experts) | _head(config) | {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size,
        "ssm.conv_kernel": config.linear_conv_kernel_dim, "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads, "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads, "full_attention_interval": 2,
        "rope.dimension_count": int(config.head_dim * config.rope_parameters["partial_rotary_factor"]),
    }  # fmt: skip


# The metadata of each family beside what all have.
OWN = {
    "mixtral": lambda config: _experts(config, config.num_local_experts) | _head(config),
    "olmoe": lambda config: _experts(config, config.num_experts) | _head(config),
    "granitemoe": _granite, "glm4_moe": _glm4, "deepseek_v2": _deepseek, "deepseek_v3": _deepseek,
    "ernie4_5_moe": _ernie, "hunyuan_v1_moe": _hunyuan,
    "qwen3_next": _qwen3_next,
}  # fmt: skip
