"""Small Hugging Face checkpoints of random experts, in every way that families name and lay them out."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

E, H, I = 3, 64, 32  # noqa: E741
QWEN = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}
CONFIG = {"model_type": "qwen3_moe", "num_experts": E, "num_hidden_layers": 2, "hidden_act": "silu"}


def random_experts(
    seed: int, dtype: torch.dtype = torch.bfloat16, sizes: tuple[int, int, int] = (E, H, I)
) -> dict[str, Tensor]:
    """gate [E,I,H], up [E,I,H], down [E,H,I]."""
    generator = torch.Generator().manual_seed(seed)
    experts, hidden, intermediate = sizes
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    return {part: torch.randn(experts, *shape, generator=generator).to(dtype) for part, shape in shapes.items()}


def separate(stem: str, experts: dict[str, Tensor], leaves: dict[str, str] = QWEN) -> dict[str, Tensor]:
    """One tensor a projection: `{stem}.{e}.gate_proj.weight`."""
    return {f"{stem}.{e}.{leaves[part]}.weight": w for part, stack in experts.items() for e, w in enumerate(stack)}


def fused(
    stem: str, experts: dict[str, Tensor], names=("gate_up_proj", "down_proj"), transposed=False, interleaved=False
):
    """One stack of all experts: `{stem}.gate_up_proj` and `{stem}.down_proj`."""
    both = torch.stack([experts["gate"], experts["up"]], dim=2 if interleaved else 1).flatten(1, 2)
    stacks = {f"{stem}.{names[0]}": both, f"{stem}.{names[1]}": experts["down"]}
    return {name: (w.mT if transposed else w).contiguous() for name, w in stacks.items()}


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], config: dict | None = None, shards: int = 1) -> Path:
    """A model folder with config.json, a tokenizer file, and the tensors dealt out over that many shards."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder
    weight_map = {}
    for number in range(shards):
        shard = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save_file(part, folder / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def two_layers(
    folder: Path, dtype: torch.dtype = torch.bfloat16, shards: int = 1
) -> tuple[Path, list[dict[str, Tensor]]]:
    """A whole little checkpoint in the qwen family's naming, and its experts by layer."""
    layers = [random_experts(seed, dtype) for seed in range(2)]
    tensors = {
        "model.embed_tokens.weight": torch.randn(50, H).to(dtype),
        "lm_head.weight": torch.randn(50, H).to(dtype),
    }
    for number, experts in enumerate(layers):
        tensors[f"model.layers.{number}.mlp.gate.weight"] = torch.randn(E, H)
        tensors[f"model.layers.{number}.input_layernorm.weight"] = torch.ones(H, dtype=dtype)
        tensors |= separate(f"model.layers.{number}.mlp.experts", experts)
    return write_checkpoint(folder, tensors, shards=shards), layers
