"""MiniMax-M2 as GGUF: scores by sigmoid with a bias for choosing, norms over all heads, part of a head turned."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf_models import TOKENS, write_gguf
from tiny_models import make, prompt

import coterie


def write(path, model):
    """The numbers of a model under the names of GGUF."""
    config, tensors = model.config, {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MINIMAXM2, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        base, _, suffix = name.rpartition(".")
        stem = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        if suffix == "gate_up_proj":
            gate, up = value.chunk(2, 1)
            found = {f"{stem}ffn_gate_exps.weight": gate, f"{stem}ffn_up_exps.weight": up}
        elif suffix == "down_proj":
            found = {f"{stem}ffn_down_exps.weight": value}
        elif suffix == "e_score_correction_bias":
            found = {f"{stem}exp_probs_b.bias": value}
        else:
            found = {f"{names.get_name(base.replace('mlp.gate', 'block_sparse_moe.gate'))}.{suffix}": value}
        tensors |= {own: (np.ascontiguousarray(kept.numpy()), "F32") for own, kept in found.items()}
    turned = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1))
    metadata = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size, "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok, "expert_gating_func": 2,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "vocab_size": config.vocab_size,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]), "rope.dimension_count": turned,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": ["a b"],
    }  # fmt: skip
    return write_gguf(path, tensors, metadata, "minimax-m2")


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_logits(tmp_path, float32_products, part):
    rope = {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": part}
    stock = make("minimax_m2", torch.float32, rope_parameters=rope)
    with torch.no_grad():
        for layer in stock.model.layers:
            layer.mlp.e_score_correction_bias.copy_(torch.linspace(-0.5, 0.5, 8))
    model = coterie.from_pretrained(write(tmp_path / "model.gguf", stock), dtype=torch.float32, experts="bf16")
    assert isinstance(model, type(stock))
    assert {name for name, _ in model.named_buffers()} == {name for name, _ in stock.named_buffers()}
    with torch.no_grad():
        found, expected = model(prompt(1)).logits, stock(prompt(1)).logits
        for layer in stock.model.layers:
            layer.mlp.e_score_correction_bias.zero_()
        unbiased = stock(prompt(1)).logits
    assert (found - expected).norm() < 4e-3 * expected.norm() < (unbiased - expected).norm()
