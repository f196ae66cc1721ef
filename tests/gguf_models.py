"""Small GGUF files of random experts, and what they stand for by the gguf package's own dequantisation."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from torch import Tensor

E, H, I = 3, 256, 512  # noqa: E741
PARTS = {"gate": (I, H), "up": (I, H), "down": (H, I)}


def blocks(kind: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random weights in a type: quantised where the package can, else blocks of random bytes with moderate scales."""
    random = np.random.default_rng(seed)
    weights = random.standard_normal(shape, dtype=np.float32) * 0.1
    if kind not in SCALES:
        return quantize(weights, Type[kind])
    columns, size = gguf.GGML_QUANT_SIZES[Type[kind]]
    made = random.integers(0, 256, (*shape[:-1], shape[-1] // columns, size), dtype=np.uint8)
    if kind == "NVFP4":
        made[..., :4] &= 0x3F
    if kind == "IQ1_M":  # the four parts of its scale are in the high halves of these bytes
        made[..., 49:56:2] = made[..., 49:56:2] & 15 | np.array([0x00, 0x00, 0x40, 0x10], dtype=np.uint8)
    for at in SCALES[kind]:
        scale = random.uniform(0.5e-3, 1e-3, made.shape[:-1]).astype("<f2")
        made[..., at : at + 2] = scale[..., None].view(np.uint8)
    return made.reshape(*shape[:-1], -1)


# Where in a block its f16 scales are, of types that the package does not quantise to.
SCALES: dict[str, tuple[int, ...]] = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,), "IQ1_M": (),
    "NVFP4": (),
}  # fmt: skip


def dense(made: np.ndarray, kind: str) -> Tensor:
    return torch.from_numpy(dequantize(made, Type[kind]).copy())


def write_gguf(
    path: Path, tensors: dict[str, tuple[np.ndarray, str]], metadata: dict | None = None, arch: str = "qwen3moe"
) -> Path:
    """A file of tensors, as stored, with their types, and the metadata of an architecture."""
    writer = gguf.GGUFWriter(path, arch)
    for key, value in (metadata or {}).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
        add[bool] = writer.add_bool
        add[type(value)](key if "." in key and key.split(".")[0] in ("tokenizer", "split") else f"{arch}.{key}", value)
    for name, (made, kind) in tensors.items():
        writer.add_tensor(name, made, raw_dtype=None if kind in ("F32", "F16") else Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def experts(
    kinds: dict[str, str], layers: int = 1
) -> tuple[dict[str, tuple[np.ndarray, str]], list[dict[str, Tensor]]]:
    """Tensors of layers of experts, each projection of a type, and their values by layer and projection."""
    tensors, values = {}, []
    for layer in range(layers):
        values.append({})
        for number, (part, size) in enumerate(PARTS.items()):
            kind = kinds[part]
            made = blocks(kind, (E, *size), seed=10 * layer + number)
            tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = made, kind
            values[layer][part] = dense(made, kind)
    return tensors, values


def write_experts(path: Path, kinds: str | dict[str, str], layers: int = 1, arch: str = "qwen3moe"):
    """(a file of nothing but experts, their values)."""
    tensors, values = experts(dict.fromkeys(PARTS, kinds) if isinstance(kinds, str) else kinds, layers)
    return write_gguf(path, tensors, {"block_count": layers, "expert_count": E}, arch), values


# Parameters of Qwen2-MoE and Qwen3-MoE in Transformers -> in GGUF.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp", "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp", "mlp.shared_expert.down_proj": "ffn_down_shexp",
}  # fmt: skip
# Gate and up that have no one format: gate is packed anew as q8_0.
MIXED = {"gate": "Q4_1", "up": "Q8_0", "down": "Q8_0"}
ARCHITECTURES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
TOKENS = ["<pad>", "<s>", "</s>", *(chr(code) for code in range(33, 125)), "ab"]


def write_qwen(
    path: Path,
    model,
    experts: str | dict[str, str | list[str]] = "Q8_0",
    rest: str | dict[str, str] = "Q8_0",
    files: int = 1,
    change: tuple[str, str | None] | None = None,
    metadata: dict | None = None,
) -> Path:
    """A Qwen2-MoE or Qwen3-MoE of Transformers as GGUF, matrices in these types, experts perhaps by projection, or by
    layer too, the rest perhaps by parameter, "" being all others, in one file or several. The model gets the weights
    that the file stands for. change: a tensor that is added in a type, or left out."""
    config, tensors = model.config, {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            layer = name.split(".")[2] if ".layers." in name else None
            stem = "" if layer is None else f"blk.{layer}."
            leaf = name.split(".", 3)[3] if layer is not None else name
            if leaf == "mlp.experts.gate_up_proj":
                named = dict(zip(("gate", "up"), parameter.chunk(2, 1), strict=True))
            elif leaf == "mlp.experts.down_proj":
                named = {"down": parameter}
            else:
                base, _, suffix = leaf.rpartition(".")
                kind = rest if isinstance(rest, str) else rest.get(name.removesuffix(".weight"), rest[""])
                kind = kind if parameter.ndim == 2 and "gate.weight" not in leaf else "F32"
                if kind in SCALES:
                    made = blocks(kind, tuple(parameter.shape), seed=len(tensors))
                else:
                    made = quantize(parameter.float().numpy(), Type[kind])
                parameter.copy_(dense(made, kind))
                tensors[f"{stem}{NAMES[base]}.{suffix}"] = made[0] if made.shape[0] == 1 else made, kind
                continue
            for part, weights in named.items():
                kind = experts if isinstance(experts, str) else experts[part]
                kind = kind if isinstance(kind, str) else kind[int(layer)]
                if kind in SCALES:
                    made = blocks(kind, tuple(weights.shape), seed=len(tensors))
                else:
                    made = quantize(weights.float().numpy(), Type[kind])
                tensors[f"{stem}ffn_{part}_exps.weight"] = made, kind
                weights.copy_(dense(made, kind))
    if change is not None and change[1] is None:
        del tensors[change[0]]
    elif change is not None:
        tensors[change[0]] = np.ones(4, np.float32), "F32"
    metadata = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_parameters["rope_theta"],
        "expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size, "vocab_size": config.vocab_size,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.padding_token_id": 0,
        **(metadata or {}),
    }  # fmt: skip
    if config.model_type == "qwen3_moe":
        metadata |= {"attention.key_length": config.head_dim, "attention.value_length": config.head_dim}
    else:
        metadata["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    metadata = {key: value for key, value in metadata.items() if value is not None}
    arch = ARCHITECTURES[config.model_type]
    if files == 1:
        return write_gguf(path, tensors, metadata, arch)
    names = [path.with_name(f"{path.stem}-{n + 1:05d}-of-{files:05d}.gguf") for n in range(files)]
    for n, file in enumerate(names):
        part = {name: tensors[name] for name in list(tensors)[n::files]}
        write_gguf(file, part, (metadata if n == 0 else {}) | {"split.tensors.count": len(tensors)}, arch)
    return names[0]


# Parameters of Qwen3.5-MoE that the others have not, or under another name.
QWEN35 = NAMES | {
    "post_attention_layernorm": "post_attention_norm", "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate", "linear_attn.in_proj_a": "ssm_alpha", "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d", "linear_attn.norm": "ssm_norm", "linear_attn.out_proj": "ssm_out",
    "linear_attn.A_log": "ssm_a",
}  # fmt: skip


def write_qwen35(path: Path, model) -> Path:
    """A file of a Qwen3.5-MoE's shapes: its numbers under the names and in the shapes of GGUF, without what llama.cpp
    does to some of them, so that it stands for another model than this one."""
    config, tensors = model.config, {}
    for name, parameter in model.named_parameters():
        layer = name.split(".")[2] if ".layers." in name else None
        stem, leaf = ("", name) if layer is None else (f"blk.{layer}.", name.split(".", 3)[3])
        values = parameter.detach().float()
        if leaf == "mlp.experts.gate_up_proj":
            named = {
                f"ffn_{part}_exps.weight": half for part, half in zip(("gate", "up"), values.chunk(2, 1), strict=True)
            }
        elif leaf == "mlp.experts.down_proj":
            named = {"ffn_down_exps.weight": values}
        elif leaf == "linear_attn.dt_bias":
            named = {"ssm_dt.bias": values}
        elif leaf == "linear_attn.A_log":
            named = {"ssm_a": -values.exp()}
        else:
            kept = values.squeeze() if "conv1d" in leaf or "shared_expert_gate" in leaf else values
            named = {f"{QWEN35[leaf.removesuffix('.weight')]}.weight": kept}
        for own, kept in named.items():
            tensors[stem + own] = np.ascontiguousarray(kept.numpy()), "F32"
    head_dim = config.head_dim
    metadata = {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads, "attention.key_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "full_attention_interval": 2,
        "ssm.conv_kernel": config.linear_conv_kernel_dim, "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads, "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads, "rope.freq_base": 10000.0,
        "rope.dimension_sections": [2, 1, 1, 0], "rope.dimension_count": head_dim // 4,
        "expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_feed_forward_length": config.shared_expert_intermediate_size, "tokenizer.ggml.tokens": TOKENS,
    }  # fmt: skip
    return write_gguf(path, tensors, metadata, arch="qwen35moe")
