"""A small gpt-oss with random experts in MXFP4: as it is published, and the same weights as llama.cpp has them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import torch
from gguf import MODEL_ARCH, get_tensor_name_map
from gguf.quants import quantize
from gguf_models import TOKENS, Type, write_gguf
from hf.tiny_models import make
from quantised_checkpoints import mxfp4
from safetensors.torch import load_file, save_file
from torch import Tensor

EXPERTS = re.compile(r"(model\.layers\.\d+\.mlp\.experts\.)(gate_up|down)_proj")


def write_mxfp4(folder: Path, **changes) -> Path:
    """A checkpoint folder with blocks and scales, gate and up interleaved."""
    model = make("gpt_oss", **({"hidden_size": 128, "intermediate_size": 192} | changes))
    model.save_pretrained(folder)
    random, tensors = torch.Generator().manual_seed(0), load_file(folder / "model.safetensors")
    for name in [name for name in tensors if EXPERTS.fullmatch(name)]:
        made = [mxfp4(random, *weight.T.shape)[0] for weight in tensors.pop(name)]
        blocks = torch.stack([parts["weight_packed"] for parts in made]).unflatten(-1, (-1, 16))
        tensors |= {f"{name}_blocks": blocks.contiguous()}
        tensors |= {f"{name}_scales": torch.stack([parts["weight_scale"] for parts in made])}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return folder


def write_as_gguf(path: Path, folder: Path, fused: bool = False, **metadata) -> Path:
    """The checkpoint in `folder` as a GGUF file; `fused` with gate and up in one tensor. metadata: changes to it, by
    key with __ for a dot, None for none."""
    config, stored = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    names = get_tensor_name_map(MODEL_ARCH.GPT_OSS, config["num_hidden_layers"])
    tensors = {}
    for name, value in stored.items():
        base, _, suffix = name.rpartition(".")
        if "mlp.experts" in name:
            layer, leaf = name.split(".")[2], "bias" if name.endswith("_bias") else "weight"
            for part, made in experts(name, value, stored, fused).items():
                tensors[f"blk.{layer}.ffn_{part}_exps.{leaf}"] = made
        elif suffix == "sinks":
            tensors[f"{names.get_name(name)}.weight"] = value.float().numpy(), "F32"
        else:
            plain = value.ndim == 1 or "router" in name
            kind = "F32" if plain else "BF16"
            tensors[f"{names.get_name(base)}.{suffix}"] = (
                value.float().numpy() if plain else quantize(value.float().numpy(), Type.BF16), kind,
            )  # fmt: skip
    rope = config["rope_parameters"]
    values = {
        "block_count": config["num_hidden_layers"], "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "expert_feed_forward_length": config["intermediate_size"], "expert_count": config["num_local_experts"],
        "expert_used_count": config["num_experts_per_tok"], "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"], "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"], "attention.sliding_window": config["sliding_window"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": config["head_dim"], "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-4o",
        "tokenizer.ggml.tokens": TOKENS, "tokenizer.ggml.merges": ["a b"], "tokenizer.ggml.eos_token_id": 2,
    }  # fmt: skip
    if rope["rope_type"] == "yarn":
        values |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(rope["factor"])}
        values |= {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
    values |= {key.replace("__", "."): value for key, value in metadata.items()}
    return write_gguf(path, tensors, {k: v for k, v in values.items() if v is not None}, "gpt-oss")


def experts(name: str, value: Tensor, stored: dict[str, Tensor], fused: bool) -> dict[str, tuple[np.ndarray, str]]:
    """The tensors by projection that a tensor of experts becomes; scales go along with blocks."""
    if name.endswith("_scales"):
        return {}
    if name.endswith("_bias"):
        whole, kind = value.float(), "F32"
    else:
        whole, kind = blocks(value, stored[name.replace("_blocks", "_scales")]), "MXFP4"
    if "down_proj" in name:
        return {"down": (whole.numpy(), kind)}
    gate, up = (whole[:, first::2].contiguous() for first in (0, 1))
    if fused:
        return {"gate_up": (torch.cat([gate, up], 1).numpy(), kind)}
    return {"gate": (gate.numpy(), kind), "up": (up.numpy(), kind)}


def blocks(codes: Tensor, scales: Tensor) -> Tensor:
    """[E, rows, groups, 16] bytes of two neighbours each and [E, rows, groups] -> [E, rows, groups * 17]: the scale of
    a group, and then bytes of a code and of that which comes 16 later."""
    apart = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    packed = apart[..., :16] | apart[..., 16:] << 4
    return torch.cat([scales[..., None], packed], -1).flatten(-2)
