"""What fine-tuning with LoRA on attention and experts takes, as `coterie sft` does it by default.

What the model keeps for the backward pass is counted in a run without storage; the rest is arithmetic on what was
measured: `coterie bench train memory` (a layer's experts), and the peak of whole runs
(`python benchmarks/plan_training.py` compares one with what is said here).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from coterie.checkpoints.packed_formats import ModelFormats
from coterie.errors import ArgumentError
from coterie.hf import skeleton
from coterie.hf.empty import empty_model
from coterie.plan.anatomy import Anatomy
from coterie.plan.dense import Dense

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")  # what `coterie sft` adapts besides the experts
RESERVE = 10**9  # bytes for Python, torch, and the libraries of training
TRACED_TOKENS = 512  # a longer sequence is extrapolated from this one and its half
WORKSPACE = 16 << 20  # of the experts' backward pass, and for each of its T*K*(2I+R) values:
WORKSPACE_PER_VALUE = 4.5  # bytes that are not kept by the forward pass
HEAD_COLUMNS = 32768  # TRL computes the loss in tiles of so many words of the vocabulary
HEAD_BYTES = 16  # for each value of a tile: its logit, and its gradient, in float32, and what they are made of


@dataclass(frozen=True, slots=True)
class TrainAnatomy:
    """What a step of [batch, tokens] takes besides weights, in bytes."""

    rank: int
    batch: int
    tokens: int
    lora: int  # the adapter's parameters, float32; its gradients take as much, and AdamW's state twice that
    activations: int  # kept by every layer until its backward pass
    checkpointed: int  # the same where gradient checkpointing keeps one layer's and each layer's input
    workspace: int  # of the backward pass of one layer of experts, and of the loss


@dataclass(frozen=True, slots=True)
class Training:
    """Training with experts in one format, in bytes."""

    format: str
    weights: int
    ram: int
    ram_checkpointed: int
    ram_short: int  # missing; 0 when it fits


def train_inspect(config: Any, anatomy: Anatomy, rank: int = 16, batch: int = 1, tokens: int = 1024) -> TrainAnatomy:
    """What training takes of the model of a Transformers config, whatever its experts are packed in."""
    for name, value in (("lora-r", rank), ("micro-batch-size", batch), ("sequence-len", tokens)):
        if value < 1:
            raise ArgumentError(f"{name} is {value}, expected at least 1")
    model = empty_model(config, dtype=torch.bfloat16)
    adapted = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith(ATTENTION)]
    in_attention = sum(m.in_features + m.out_features for m in adapted)
    in_experts = sum(layer.layout.num_experts * sum(_lora_values(layer.layout)) for layer in anatomy.experts)
    # The kernels take B in another order than PEFT keeps it: a copy of each layer's lives until its backward pass.
    copies = sum(layer.layout.num_experts * _lora_values(layer.layout)[1] for layer in anatomy.experts)

    rows = batch * tokens
    kept = _kept(config, anatomy, batch, tokens)
    # PEFT's linear layers keep their input and its product with A, in float32.
    kept += 4 * rows * sum(m.in_features + rank for m in adapted)
    kept += 4 * rank * copies
    layers = config.get_text_config().num_hidden_layers
    hidden = model.get_input_embeddings().weight.shape[1]
    values = max(rows * layer.per_token * (2 * layer.layout.intermediate_size + rank) for layer in anatomy.experts)
    columns = min(HEAD_COLUMNS, model.get_input_embeddings().weight.shape[0])
    return TrainAnatomy(
        rank=rank,
        batch=batch,
        tokens=tokens,
        lora=4 * rank * (in_attention + in_experts),
        activations=kept,
        checkpointed=kept // layers + 2 * rows * hidden * layers,
        workspace=WORKSPACE + int(WORKSPACE_PER_VALUE * values) + HEAD_BYTES * rows * columns,
    )


def train_estimate(
    anatomy: Anatomy, train: TrainAnatomy, formats: ModelFormats, ram: int, dense: Dense | None = None
) -> Training:
    """Training with the experts in these formats, and linear layers packed as `dense` says, in `ram` usable bytes."""
    weights = anatomy.experts_nbytes(formats) + anatomy.rest_nbytes - (dense.saved if dense else 0)
    fixed = weights + 4 * train.lora + train.workspace + RESERVE
    needed = fixed + train.activations
    return Training(formats.name, weights, needed, fixed + train.checkpointed, max(0, needed - ram))


def _kept(config: Any, anatomy: Anatomy, batch: int, tokens: int) -> int:
    """Bytes that the forward pass keeps; a T + b T^2 in the tokens of a sequence, from two short ones."""
    layouts = {layer.name: layer.layout for layer in anatomy.experts}
    if tokens <= TRACED_TOKENS:
        return skeleton.saved_for_backward(config, layouts, batch, tokens)
    half = TRACED_TOKENS // 2
    short, long = (skeleton.saved_for_backward(config, layouts, batch, t) for t in (half, TRACED_TOKENS))
    square = (long / TRACED_TOKENS - short / half) / half
    return int((long / TRACED_TOKENS - square * TRACED_TOKENS + square * tokens) * tokens)


def _lora_values(layout: Any) -> tuple[int, int]:
    """Values for each rank in A and in B of one expert's gate_up_proj and down_proj."""
    inner, hidden = layout.intermediate_size, layout.hidden_size
    return hidden + inner, (2 if layout.has_gate else 1) * inner + hidden
