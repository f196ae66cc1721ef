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
    "qwen3_next": "qwen3next", "dots1": "dots1", "exaone_moe": "exaone-moe", "afmoe": "afmoe", "lfm2_moe": "lfm2moe",
    "granitemoeshared": "granitemoe", "granitemoehybrid": "granitehybrid", "nemotron_h": "nemotron_h_moe",
    "kimi_linear": "kimi-linear", "glm_moe_dsa": "glm-dsa", "jamba": "jamba",
    "gemma4_text": "gemma4",
}  # fmt: skip
# What is another model under its own name, and opens as that one: DeepSeek-V3, GLM-4.5.
ALIASES = {"glm4_moe_lite": "deepseek2", "solar_open": "glm4moe"}
# Parameters of Gemma 4 that the package has no names for, or that stay in one piece.
GEMMA4 = {
    "gate_up_proj": "ffn_gate_up_exps.weight", "scale": "ffn_gate_inp.scale", "per_expert_scale": "ffn_down_exps.scale",
    "layer_scalar": "layer_output_scale.weight",
}  # fmt: skip
SEEING = {"qwen3_vl_moe": "qwen3vlmoe"}  # of which the language model opens, as a Qwen3-MoE
# Rows of q and k that turn together are stored beside each other.
PAIRS = ("mixtral", "granitemoe", "granitemoeshared", "granitemoehybrid")


def write_family(path: Path, model, split_latent: bool = True, more: dict | None = None) -> Path:
    """All numbers of a model in float32. split_latent: keys' and values' matrices apart, as written since 2025."""
    config, tensors = model.config, {}
    config = config.get_text_config()
    arch = (ARCHITECTURES | ALIASES | SEEING)[model.config.model_type]
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        name = name.replace("model.language_model.", "model.")
        if ".visual." in name or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        stem = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        for found, part in _parts(name, value.detach().float(), config, stem, names, split_latent).items():
            tensors[found] = np.ascontiguousarray(part.numpy()), "F32"
    if config.model_type == "gemma4_text":
        tensors["rope_freqs.weight"] = _factors(config), "F32"
    metadata = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": getattr(config, "intermediate_size", None),
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": _keys(config),
        "attention.layer_norm_rms_epsilon": _epsilon(config), "vocab_size": config.vocab_size,
        "rope.freq_base": float(_rope(config)["rope_theta"]),
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0,
        **OWN[model.config.model_type](config), **(more or {}),
    }  # fmt: skip
    return write_gguf(path, tensors, {key: value for key, value in metadata.items() if value is not None}, arch)


def _parts(name: str, value: Tensor, config, stem: str, names, split_latent: bool) -> dict[str, Tensor]:
    """What a parameter is in a file."""
    base, _, suffix = name.rpartition(".")
    if config.model_type == "gemma4_text" and suffix in GEMMA4:
        return {f"{stem}{GEMMA4[suffix]}": value}
    if suffix == "gate_up_proj":
        gate, up = value.chunk(2, 1)
        return {f"{stem}ffn_gate_exps.weight": gate, f"{stem}ffn_up_exps.weight": up}
    if suffix in ("up_proj", "down_proj"):
        return {f"{stem}ffn_{suffix.removesuffix('_proj')}_exps.weight": value}
    if suffix in ("e_score_correction_bias", "expert_bias"):
        return {f"{stem}exp_probs_b.bias": value}
    if base.endswith("shared_mlp.input_linear"):
        gate, up = value.chunk(2)
        return {f"{stem}ffn_gate_shexp.weight": gate, f"{stem}ffn_up_shexp.weight": up}
    if config.model_type == "jamba" and suffix in ("A_log", "D"):
        return {f"{stem}ssm_{suffix[0].lower()}": -value.exp() if suffix == "A_log" else value}
    if config.model_type != "jamba" and ("mixer." in name or "mamba." in name):
        if suffix == "dt_bias":
            return {f"{stem}ssm_dt.bias": value}
        if suffix in ("A_log", "D"):
            return {f"{stem}ssm_{suffix[0].lower()}": (-value.exp() if suffix == "A_log" else value)[:, None]}
        if base.endswith(("mixer.norm", "mamba.norm")):
            value = value.unflatten(0, (getattr(config, "n_groups", None) or config.mamba_n_groups, -1))
    if config.model_type == "kimi_linear":
        if base.endswith("conv1d"):
            kernels = zip("qkv", value.transpose(0, 1)[None].chunk(3, 2), strict=True)
            return {f"{stem}ssm_conv1d_{kind}.weight": kernel.transpose(1, 2) for kind, kernel in kernels}
        if suffix in ("A_log", "dt_bias"):
            return {f"{stem}ssm_a": -value.exp()} if suffix == "A_log" else {f"{stem}ssm_dt.bias": value}
        base = base.replace("forget_gate.", "")
    if base.endswith(("conv1d", "conv.conv")) and suffix == "weight":
        value = value.squeeze(1)
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
    base = base.replace("block_sparse_moe.router", "block_sparse_moe.router.layer")
    found = names.get_name(base) or names.get_name(base.replace("model.", "backbone.", 1))
    assert found, name
    return {f"{found}.{suffix}": value}


def _keys(config) -> int | list[int]:
    """Heads of keys, of each layer where layers differ."""
    if config.model_type != "gemma4_text":
        return config.num_key_value_heads
    return [config.per_layer_config[kind].num_key_value_heads for kind in config.layer_types]


def _factors(config) -> np.ndarray:
    """What llama.cpp divides the frequencies of pairs by: those that are not turned have one next to 0."""
    pairs = config.per_layer_config["full_attention"].head_dim // 2
    turned = int(pairs * _rope(config)["partial_rotary_factor"])
    return np.array([1.0] * turned + [1e30] * (pairs - turned), np.float32)


def _rope(config) -> dict:
    """That of layers that attend to all tokens, where kinds of layers differ."""
    found = getattr(config, "rope_parameters", None) or {"rope_theta": 10000}
    return found.get("full_attention", found)


def _epsilon(config) -> float:
    names = ("rms_norm_eps", "norm_eps", "layer_norm_epsilon")
    return next(getattr(config, name) for name in names if hasattr(config, name))


def _head(config) -> dict:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {"attention.key_length": head, "attention.value_length": head, "rope.dimension_count": head}


def _experts(config, count: int, used: int | None = None) -> dict:
    return {"expert_count": count, "expert_used_count": used or config.num_experts_per_tok}


def _routed(config, gating: int) -> dict:
    return _experts(config, config.n_routed_experts) | {
        "expert_feed_forward_length": config.moe_intermediate_size, "expert_shared_count": config.n_shared_experts,
        "leading_dense_block_count": getattr(config, "first_k_dense_replace", 0), "expert_gating_func": gating,
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
        "expert_shared_feed_forward_length": getattr(config, "shared_intermediate_size", None),
    }  # fmt: skip


def _granite_hybrid(config) -> dict:
    return _granite(config) | {
        "attention.head_count_kv": _of_attention(config),
        "rope.scaling.finetuned": config.position_embedding_type == "rope", "ssm.conv_kernel": config.mamba_d_conv,
        "ssm.state_size": config.mamba_d_state, "ssm.group_count": config.mamba_n_groups,
        "ssm.time_step_rank": config.mamba_n_heads, "ssm.inner_size": config.mamba_d_head * config.mamba_n_heads,
    }  # fmt: skip


def _of_attention(config) -> list[int]:
    return [config.num_key_value_heads if kind == "full_attention" else 0 for kind in config.layer_types]


def _jamba(config) -> dict:
    return _experts(config, config.num_experts) | {
        "attention.head_count_kv": _of_attention(config), "rope.freq_base": None,
        "ssm.conv_kernel": config.mamba_d_conv, "ssm.state_size": config.mamba_d_state,
        "ssm.time_step_rank": config.mamba_dt_rank, "ssm.inner_size": config.mamba_expand * config.hidden_size,
    }  # fmt: skip


def _kimi(config) -> dict:
    sizes = {key: value for key, value in _mla(config).items() if key != "attention.head_count_kv"}
    return _experts(config, config.num_experts) | sizes | {
        "attention.head_count_kv": [int(kind == "full_attention") for kind in config.layer_types],
        "attention.value_length": None, "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "kda.head_dim": config.linear_head_dim, "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts, "expert_gating_func": 2,
        "leading_dense_block_count": config.mlp_layer_types.count("dense"),
        "expert_weights_scale": float(config.routed_scaling_factor),
    }  # fmt: skip


def _lfm2(config) -> dict:
    return _experts(config, config.num_experts) | {
        "attention.head_count_kv": _of_attention(config), "expert_feed_forward_length": config.moe_intermediate_size,
        "leading_dense_block_count": config.num_dense_layers, "expert_gating_func": 2,
        "shortconv.l_cache": config.conv_L_cache,
    }  # fmt: skip


def _nemotron(config) -> dict:
    widths = [config.moe_intermediate_size if kind == "moe" else 0 for kind in config.layer_types]
    return _experts(config, config.n_routed_experts) | _head(config) | {
        "attention.head_count_kv": _of_attention(config), "feed_forward_length": widths,
        "expert_feed_forward_length": config.moe_intermediate_size, "expert_shared_count": config.n_shared_experts,
        "expert_shared_feed_forward_length": config.moe_shared_expert_intermediate_size,
        "expert_weights_scale": float(config.routed_scaling_factor), "expert_weights_norm": config.norm_topk_prob,
        "expert_group_count": config.n_group, "moe_latent_size": config.moe_latent_size,
        "ssm.conv_kernel": config.conv_kernel, "ssm.state_size": config.ssm_state_size,
        "ssm.group_count": config.n_groups, "ssm.time_step_rank": config.mamba_num_heads,
        "ssm.inner_size": config.mamba_head_dim * config.mamba_num_heads,
    }  # fmt: skip


def _qwen3_vl(config) -> dict:
    sections = [*config.rope_parameters["mrope_section"], 0]
    return _experts(config, config.num_experts) | _head(config) | {
        "expert_feed_forward_length": config.moe_intermediate_size, "rope.dimension_sections": sections,
        "n_deepstack_layers": 1,
    }  # fmt: skip


def _dots(config) -> dict:
    return _routed(config, 2) | _head(config)


def _exaone(config) -> dict:
    return _experts(config, config.num_experts) | _head(config) | {
        "expert_feed_forward_length": config.moe_intermediate_size, "expert_shared_count": config.num_shared_experts,
        "expert_shared_feed_forward_length": config.moe_intermediate_size * config.num_shared_experts,
        "leading_dense_block_count": config.first_k_dense_replace, "expert_gating_func": 2,
        "expert_weights_scale": float(config.routed_scaling_factor), "expert_weights_norm": config.norm_topk_prob,
        "expert_group_count": config.n_group, "expert_group_used_count": config.topk_group,
        "attention.sliding_window": config.sliding_window, "rope.scaling.type": "none", "nextn_predict_layers": 0,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
    }  # fmt: skip


def _afmoe(config) -> dict:
    return _experts(config, config.num_experts) | _head(config) | {
        "expert_feed_forward_length": config.moe_intermediate_size, "expert_shared_count": config.num_shared_experts,
        "leading_dense_block_count": config.num_dense_layers, "expert_gating_func": 2, "expert_weights_norm": True,
        "expert_weights_scale": float(config.route_scale), "attention.sliding_window": config.sliding_window,
    }  # fmt: skip


def _deepseek(config) -> dict:
    return _routed(config, 1 if config.model_type == "deepseek_v2" else 2) | _mla(config)


def _mla(config) -> dict:
    key = config.qk_nope_head_dim + config.qk_rope_head_dim
    return {
        "attention.head_count_kv": 1, "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank, "rope.dimension_count": config.qk_rope_head_dim,
        "attention.key_length": config.kv_lora_rank + config.qk_rope_head_dim,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": key, "attention.value_length_mla": config.v_head_dim,
    }  # fmt: skip


def _glm_dsa(config) -> dict:
    return _routed(config, 2) | _mla(config) | {
        "attention.indexer.head_count": config.index_n_heads, "attention.indexer.key_length": config.index_head_dim,
        "attention.indexer.top_k": config.index_topk,
        "attention.indexer.types": [kind == "full" for kind in config.indexer_types],
    }  # fmt: skip


def _ernie(config) -> dict:
    return _experts(config, config.moe_num_experts, config.moe_k) | _head(config) | {
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.moe_intermediate_size * config.moe_num_shared_experts,
        "expert_shared_count": config.moe_num_shared_experts, "leading_dense_block_count": config.moe_layer_start_index,
        "interleave_moe_layer_step": config.moe_layer_interval,
    }  # fmt: skip


def _gemma4(config) -> dict:
    near, of_all = (config.per_layer_config[kind] for kind in ("sliding_attention", "full_attention"))
    return _experts(config, config.num_experts, config.top_k_experts) | {
        "expert_feed_forward_length": config.moe_intermediate_size, "attention.sliding_window": config.sliding_window,
        "attention.shared_kv_layers": 0,
        "attention.sliding_window_pattern": [kind == "sliding_attention" for kind in config.layer_types],
        "embedding_length_per_layer_input": 0, "attention.key_length": of_all.head_dim,
        "attention.value_length": of_all.head_dim, "attention.key_length_swa": near.head_dim,
        "attention.value_length_swa": near.head_dim, "rope.dimension_count": of_all.head_dim,
        "rope.dimension_count_swa": near.head_dim, "final_logit_softcapping": config.final_logit_softcapping,
        "rope.freq_base_swa": float(config.rope_parameters["sliding_attention"]["rope_theta"]),
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
    "qwen3_next": _qwen3_next, "dots1": _dots, "exaone_moe": _exaone, "afmoe": _afmoe, "lfm2_moe": _lfm2,
    "granitemoeshared": _granite, "granitemoehybrid": _granite_hybrid, "nemotron_h": _nemotron,
    "kimi_linear": _kimi, "glm_moe_dsa": _glm_dsa, "glm4_moe_lite": _deepseek, "solar_open": _glm4,
    "jamba": _jamba, "gemma4_text": _gemma4,
    "qwen3_vl_moe": _qwen3_vl,
}  # fmt: skip
