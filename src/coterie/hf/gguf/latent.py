"""Attention that caches what a token's keys and values are made of, DeepSeek's, in GGUF files."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.checkpoints.gguf_file import GgufFile
from coterie.hf.gguf.family import Settings, stated


def latent(file: GgufFile) -> Settings:
    turned = stated(file, "rope.dimension_count")
    key = stated(file, "attention.key_length_mla", stated(file, "attention.key_length"))
    return {
        "num_key_value_heads": stated(file, "attention.head_count"),
        "q_lora_rank": stated(file, "attention.q_lora_rank", None),
        "kv_lora_rank": stated(file, "attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key - turned,
        "v_head_dim": stated(file, "attention.value_length_mla", stated(file, "attention.value_length", None)),
    }


def _keys_and_values(file: GgufFile, keys: Tensor, values: Tensor) -> Tensor:
    """The matrix that makes keys and values of what is cached of a token, a head after the other; that of keys is
    stored transposed."""
    return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)


LATENT = {
    "attn_q_a": "self_attn.q_a_proj", "attn_q_a_norm": "self_attn.q_a_layernorm", "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa", "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj", "attn_k_b": "self_attn.kv_b_proj",
}  # fmt: skip
JOINED_LATENT = {"attn_k_b.weight": (("attn_v_b.weight",), _keys_and_values)}
