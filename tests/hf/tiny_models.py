"""Tiny models of every supported family: real Transformers code, random weights, a second to make and run."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "shared_expert_intermediate_size": 32,
}
LATENT_ATTENTION = {
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
}

DENSE_FIRST = {
    "moe_intermediate_size": 96,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "head_dim": 16,
}

# One row a family: (model_type, what it adds to COMMON). Columns are multiples of 32, not of 64.
FAMILIES: dict[str, dict] = {
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 96, "head_dim": 16},
    "qwen3_next": {"num_experts": 8, "moe_intermediate_size": 96, **LINEAR_ATTENTION},
    "qwen3_5_moe_text": {"num_experts": 8, "moe_intermediate_size": 96, **LINEAR_ATTENTION},
    "mixtral": {"num_local_experts": 8, "intermediate_size": 96, "sliding_window": None},
    "olmoe": {"num_experts": 8, "intermediate_size": 96},
    "deepseek_v2": {"n_routed_experts": 8, "moe_intermediate_size": 96, **LATENT_ATTENTION},
    "deepseek_v3": {"n_routed_experts": 8, "moe_intermediate_size": 96, **LATENT_ATTENTION},
    "glm4_moe": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 96,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "head_dim": 16,
    },
    "gpt_oss": {
        "num_local_experts": 8,
        "intermediate_size": 96,
        "head_dim": 16,
        "sliding_window": 16,
        "rope_parameters": ROPE,
    },
    "minimax_m2": {"num_local_experts": 8, "intermediate_size": 96, "head_dim": 16},
    "ernie4_5_moe": {
        "moe_num_experts": 8,
        "moe_k": 2,
        "moe_intermediate_size": 96,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "intermediate_size": 96, "head_dim": 16},
    "phimoe": {"num_local_experts": 8, "intermediate_size": 96, "sliding_window": None},
    "granitemoe": {"num_local_experts": 8, "intermediate_size": 96},
    "granitemoeshared": {
        "num_local_experts": 8,
        "intermediate_size": 96,
        "shared_intermediate_size": 32,
        "attention_multiplier": 0.25,
    },
    "granitemoehybrid": {
        "num_local_experts": 8,
        "intermediate_size": 96,
        "shared_intermediate_size": 32,
        "attention_multiplier": 0.25,
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
    },
    "nemotron_h": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 96,
        "moe_shared_expert_intermediate_size": 32,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "head_dim": 16,
    },
    "jamba": {
        "num_experts": 8,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 16,
        "mamba_dt_rank": 8,
    },
    "lfm2_moe": {
        "num_experts": 8,
        "moe_intermediate_size": 96,
        "intermediate_size": 96,
        "num_dense_layers": 1,
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
    },
    "dots1": {**DENSE_FIRST, "n_routed_experts": 8, "n_shared_experts": 1},
    "glm4_moe_lite": {"n_routed_experts": 8, "moe_intermediate_size": 96, **LATENT_ATTENTION},
    "glm_moe_dsa": {
        "n_routed_experts": 8,
        "moe_intermediate_size": 96,
        **LATENT_ATTENTION,
        "index_n_heads": 4,
        "index_head_dim": 16,
        "index_topk": 128,
    },
    "solar_open": {"n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 96, "head_dim": 16},
    "kimi_linear": {
        "num_experts": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 96,
        "intermediate_size": 96,
        "first_k_dense_replace": 1,
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "exaone_moe": {
        **DENSE_FIRST,
        "num_experts": 8,
        "num_shared_experts": 1,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "afmoe": {
        "num_experts": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 96,
        "intermediate_size": 96,
        "num_dense_layers": 2,
        "num_hidden_layers": 4,
        "head_dim": 16,
        "sliding_window": 16,
        "mup_enabled": True,
    },
    "gemma4_text": {
        "num_experts": 8,
        "top_k_experts": 2,
        "moe_intermediate_size": 96,
        "intermediate_size": 96,
        "enable_moe_block": True,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 16,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0,
    },
}

# Families whose checkpoints are tried quantised too, for their names of experts: qwen3_moe in every way, these in one.
QUANTISED = {"mixtral": "fp8 by blocks", "deepseek_v3": "fp8 by blocks", "minimax_m2": "fp8 by blocks"}


# Of those, some that are built each in another way.
STRUCTURES = [
    "qwen2_moe", "qwen3_next", "mixtral", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "phimoe", "granitemoehybrid",
    "nemotron_h", "jamba", "lfm2_moe", "kimi_linear", "gemma4_text",
]  # fmt: skip


def make(family: str, dtype: torch.dtype = torch.bfloat16, **changes) -> PreTrainedModel:
    """A model of that family with random weights, in eval mode, its experts strong enough to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **changes})
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    strengthen(model)
    return model.to(dtype).eval()


@torch.no_grad()
def strengthen(model: PreTrainedModel) -> None:
    """Gives it weights that make every part of it matter."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
            if "dt_bias" in name:  # no steps so short that Transformers lengthens them in a prompt, not after it
                parameter.clamp_(min=-1)
        elif "bias" in name:
            parameter.normal_(std=0.2)
        else:
            parameter.normal_(std=1.0 if "embed" in name else 2.0 * max(parameter.shape[-2:]) ** -0.5)


def make_vision(kind: str) -> PreTrainedModel:
    """A multimodal model: qwen3_vl_moe or qwen3_5_moe."""
    text = {**COMMON, "num_experts": 8, "moe_intermediate_size": 96, "head_dim": 16}
    rope = {**ROPE, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    if kind == "qwen3_5_moe":
        text |= LINEAR_ATTENTION
        rope |= {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.25}
    sizes = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    patches = {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = AutoConfig.for_model(
        kind,
        text_config={**text, "rope_parameters": rope},
        vision_config=sizes | patches,
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


def prompt(batch: int = 2, length: int = 12) -> torch.Tensor:
    """Token ids [batch, length] without special ones."""
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(1))
