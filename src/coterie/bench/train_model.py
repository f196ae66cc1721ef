"""A training step of a whole model, LoRA on attention and experts, beside PEFT's own on Transformers' experts."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from transformers import Qwen3MoeConfig

from coterie.bench.layer import check_peer
from coterie.bench.random_model import qwen3_30b, random_model
from coterie.bench.steps import Steps, frozen_and_trained, with_lora
from coterie.bench.train import TrainResult, check_sizes, compare
from coterie.formats import Format, resolve
from coterie.hf.experts import NAME

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


class ModelSteps(Steps):
    """Loss of one sequence, its gradients and a step of AdamW; with `spec` the experts are packed."""

    def __init__(self, config: Qwen3MoeConfig, implementation: str, spec: Format | None, rank: int):
        model = random_model(config, implementation, spec)
        model.config.use_cache = False
        self.vocabulary = config.vocab_size
        self.model = with_lora(model, rank, ATTENTION).train()
        self.frozen, self.trained = frozen_and_trained(self.model)
        self.optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), 1e-5, fused=True)

    def prepare(self, tokens: int) -> None:
        random = torch.Generator().manual_seed(tokens)
        self.ids = torch.randint(self.vocabulary, (1, tokens), generator=random)

    def step(self, number: int = 0) -> None:
        self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.model.zero_grad()


def bench_train_model(
    format: str = "int4",
    group_size: int | None = None,
    zero_point: bool = False,
    layers: int = 4,
    vocabulary: int = 32768,
    tokens: tuple[int, ...] = (512,),
    rank: int = 16,
    peer: str = "grouped_mm",
    seconds: float = 1.0,
    rounds: int = 3,
) -> Iterator[TrainResult]:
    """Yields one result per length of the sequence. Memory: both models, and a step of the peer's."""
    check_peer(peer)
    check_sizes(tokens, rank)
    config, spec = qwen3_30b(layers, vocabulary), resolve(format, group_size, zero_point)
    ours = partial(ModelSteps, config, NAME, spec, rank)
    yield from compare(ours, partial(ModelSteps, config, peer, None, rank), tokens, seconds, rounds)
