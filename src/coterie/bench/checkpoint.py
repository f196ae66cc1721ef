"""A plain checkpoint of random weights with the names and sizes of a Qwen3-MoE model, made as fast as a disk writes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig

from coterie.checkpoints.folder import INDEX
from coterie.checkpoints.tensorwriter import TensorWriter, check_room, remove_empty, remove_temporaries, write_text
from coterie.errors import ArgumentError

POOL = 1 << 24  # random values that all weights are pieces of
PIECE = POOL // 2
SHARD = 4 * 10**9  # bytes at most
CONFIG = "config.json"

Tensors = list[tuple[str, tuple[int, ...]]]


def write_random_checkpoint(folder: Path, config: Qwen3MoeConfig, shard_nbytes: int = SHARD) -> int:
    """Writes the checkpoint in bf16, and returns the bytes of its shards. Shards that are there are kept.

    A shard appears whole or not at all, and the index last: a folder with an index is a whole checkpoint. Raises
    ArgumentError where the folder holds another model, CheckpointError where the disk has not enough room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures, config.dtype = ["Qwen3MoeForCausalLM"], torch.bfloat16
    text = config.to_json_string()
    if (folder / CONFIG).exists() and (folder / CONFIG).read_text() != text:
        raise ArgumentError(f"{folder} holds another model: give a new folder, or remove it")
    shards = _shards(config, shard_nbytes)
    writers = [
        TensorWriter(path, [(name, "BF16", shape) for name, shape in tensors], {"format": "pt"})
        for path, tensors in zip(_paths(folder, len(shards)), shards, strict=True)
    ]
    missing = [i for i, w in enumerate(writers) if not w.path.exists() or w.path.stat().st_size != w.nbytes]
    total = sum(writer.nbytes for writer in writers)
    if not missing and (folder / INDEX).exists():
        return total

    remove_temporaries(folder)
    check_room(folder, sum(writers[i].nbytes for i in missing))
    write_text(folder / CONFIG, text)
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0)).mul_(config.initializer_range).bfloat16()
    for i in missing:
        _write_shard(writers[i], shards[i], pool, torch.Generator().manual_seed(i))
    where = {name: w.path.name for w, tensors in zip(writers, shards, strict=True) for name, _ in tensors}
    write_text(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=1) + "\n")
    return total


def remove_random_checkpoint(folder: Path, config: Qwen3MoeConfig, shard_nbytes: int = SHARD) -> None:
    """Removes what `write_random_checkpoint` writes, and the folder where nothing else is in it."""
    shards = _paths(folder, len(_shards(config, shard_nbytes)))
    for path in (folder / INDEX, folder / CONFIG, *shards):
        path.unlink(missing_ok=True)
    remove_empty(folder)


def _write_shard(writer: TensorWriter, tensors: Tensors, pool: torch.Tensor, random: torch.Generator) -> None:
    """Norms are 1; all else is cut from the pool where `random` says."""
    with writer:
        for name, shape in tensors:
            if len(shape) == 1:
                writer.write(name, torch.ones(shape, dtype=torch.bfloat16).view(torch.uint8))
                continue
            left = math.prod(shape)
            while left:
                size, start = min(left, PIECE), int(torch.randint(PIECE, (1,), generator=random))
                writer.write(name, pool[start : start + size].view(torch.uint8))
                left -= size


def _paths(folder: Path, count: int) -> list[Path]:
    return [folder / f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _shards(config: Qwen3MoeConfig, nbytes: int) -> list[Tensors]:
    """The model's tensors in shards of so many bytes at most, or of one tensor."""
    shards: list[Tensors] = [[]]
    filled = 0
    for name, shape in _tensors(config):
        size = 2 * math.prod(shape)
        if shards[-1] and filled + size > nbytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += size
    return shards


def _tensors(config: Qwen3MoeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor, as published checkpoints have them: each expert's matrices by themselves."""
    hidden, inner, head = config.hidden_size, config.moe_intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        yield prefix + "input_layernorm.weight", (hidden,)
        yield prefix + "post_attention_layernorm.weight", (hidden,)
        yield prefix + "self_attn.q_norm.weight", (head,)
        yield prefix + "self_attn.k_norm.weight", (head,)
        yield prefix + "self_attn.q_proj.weight", (queries, hidden)
        yield prefix + "self_attn.k_proj.weight", (keys, hidden)
        yield prefix + "self_attn.v_proj.weight", (keys, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, queries)
        yield prefix + "mlp.gate.weight", (config.num_experts, hidden)
        for e in range(config.num_experts):
            yield f"{prefix}mlp.experts.{e}.gate_proj.weight", (inner, hidden)
            yield f"{prefix}mlp.experts.{e}.up_proj.weight", (inner, hidden)
            yield f"{prefix}mlp.experts.{e}.down_proj.weight", (hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config.vocab_size, hidden)
