"""GGUF files of random blocks in Q4_K_M's types, shaped like the first layers of models that are published: Q6_K for the
head and, in every other layer, for down (and v), and Q4_K for all else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, VOCABULARY, HIDDEN = 4, 32768, 2048
# Of a block: weights, bytes, and f16 scales by where they are, with which weights are as large as a model's.
BLOCKS = {
    "Q4_K": (256, 144, {0: 1.8e-4, 2: 1.3e-3}),
    "Q6_K": (256, 210, {208: 2e-5}),
    "Q8_0": (32, 34, {0: 3e-4}),
}


class File:
    """A file that is written: metadata, tokens, and tensors."""

    def __init__(self, path: Path, architecture: str, values: dict[str, Any]) -> None:
        import gguf

        self._types, self._random = gguf.GGMLQuantizationType, np.random.default_rng(0)
        self._writer = writer = gguf.GGUFWriter(path, architecture)
        common = {"block_count": LAYERS, "context_length": 32768, "embedding_length": HIDDEN, "vocab_size": VOCABULARY}
        for key, value in (common | values).items():
            kinds = {float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
            kinds[type(value)](f"{architecture}.{key}", value)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10000.0)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
        writer.add_token_types([1] * VOCABULARY)
        writer.add_token_merges(["t 0"])

    def blocks(self, name: str, kind: str, *shape: int) -> None:
        weights, nbytes, scales = BLOCKS[kind]
        made = self._random.integers(0, 256, (*shape[:-1], shape[-1] // weights, nbytes), dtype=np.uint8)
        for at, scale in scales.items():
            made[..., at : at + 2] = np.array([scale], np.float16).view(np.uint8)
        self._writer.add_tensor(f"{name}.weight", made.reshape(*shape[:-1], -1), raw_dtype=self._types[kind])

    def norm(self, name: str, size: int) -> None:
        self._writer.add_tensor(f"{name}.weight", np.ones(size, np.float32))

    def router(self, name: str, experts: int) -> None:
        weight = (self._random.standard_normal((experts, HIDDEN)) * 0.02).astype(np.float32)
        self._writer.add_tensor(f"{name}.weight", weight)

    def correction(self, name: str, experts: int) -> None:
        self._writer.add_tensor(f"{name}.bias", np.zeros(experts, np.float32))

    def mlp(self, stem: str, kind: str, width: int, down: str, *experts: int) -> None:
        """Of experts, or one."""
        for name in ("gate", "up"):
            self.blocks(f"{stem}ffn_{name}{kind}", "Q4_K", *experts, width, HIDDEN)
        self.blocks(f"{stem}ffn_down{kind}", down, *experts, HIDDEN, width)

    def write(self, layer: Callable[[str, str], None]) -> None:
        """`layer` adds one, given the stem of its names and the type of what is finer in it."""
        self.blocks("token_embd", "Q4_K", VOCABULARY, HIDDEN)
        self.blocks("output", "Q6_K", VOCABULARY, HIDDEN)
        self.norm("output_norm", HIDDEN)
        for number in range(LAYERS):
            layer(f"blk.{number}.", "Q4_K" if number % 2 else "Q6_K")
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_tensors_to_file()
        self._writer.close()


def qwen3_30b(path: Path) -> None:
    """Qwen3-30B-A3B, as e2e_model.py has it."""
    inner, experts, heads, kv_heads, head = 768, 128, 32, 4, 128
    file = File(path, "qwen3moe", {
        "feed_forward_length": 6144, "attention.head_count": heads, "attention.head_count_kv": kv_heads,
        "attention.key_length": head, "attention.value_length": head, "expert_count": experts,
        "expert_used_count": 8, "expert_feed_forward_length": inner,
    })  # fmt: skip

    def layer(stem: str, finer: str) -> None:
        for name, size in (("attn_norm", HIDDEN), ("ffn_norm", HIDDEN), ("attn_q_norm", head), ("attn_k_norm", head)):
            file.norm(f"{stem}{name}", size)
        file.blocks(f"{stem}attn_q", "Q4_K", heads * head, HIDDEN)
        file.blocks(f"{stem}attn_k", "Q4_K", kv_heads * head, HIDDEN)
        file.blocks(f"{stem}attn_v", finer, kv_heads * head, HIDDEN)
        file.blocks(f"{stem}attn_output", "Q4_K", HIDDEN, heads * head)
        file.router(f"{stem}ffn_gate_inp", experts)
        file.mlp(stem, "_exps", inner, finer, experts)

    file.write(layer)


def glm_4_7_flash(path: Path) -> None:
    """GLM-4.7-Flash, all layers with experts."""
    inner, experts, heads, latent, turned, key, value, queries = 1536, 64, 20, 512, 64, 192, 256, 768
    file = File(path, "deepseek2", {
        "feed_forward_length": 10240, "attention.head_count": heads, "attention.head_count_kv": 1,
        "attention.key_length": latent + turned, "attention.value_length": latent, "attention.key_length_mla": key + turned,
        "attention.value_length_mla": value, "attention.q_lora_rank": queries, "attention.kv_lora_rank": latent,
        "rope.dimension_count": turned, "expert_count": experts, "expert_used_count": 4, "expert_feed_forward_length": inner,
        "expert_shared_count": 1, "expert_weights_scale": 1.8, "expert_gating_func": 2, "expert_weights_norm": True,
        "leading_dense_block_count": 0,
    })  # fmt: skip

    def layer(stem: str, finer: str) -> None:
        norms = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN, "attn_q_a_norm": queries, "attn_kv_a_norm": latent}
        for name, size in norms.items():
            file.norm(f"{stem}{name}", size)
        file.blocks(f"{stem}attn_q_a", "Q4_K", queries, HIDDEN)
        file.blocks(f"{stem}attn_q_b", "Q4_K", heads * (key + turned), queries)
        file.blocks(f"{stem}attn_kv_a_mqa", "Q4_K", latent + turned, HIDDEN)
        file.blocks(f"{stem}attn_k_b", "Q8_0", heads, latent, key)  # too narrow for blocks of 256
        file.blocks(f"{stem}attn_v_b", "Q4_K", heads, value, latent)
        file.blocks(f"{stem}attn_output", "Q4_K", HIDDEN, heads * value)
        file.router(f"{stem}ffn_gate_inp", experts)
        file.correction(f"{stem}exp_probs_b", experts)
        file.mlp(stem, "_exps", inner, finer, experts)
        file.mlp(stem, "_shexp", inner, finer)

    file.write(layer)


MODELS = {"qwen3-30b": qwen3_30b, "glm-4.7-flash": glm_4_7_flash}
