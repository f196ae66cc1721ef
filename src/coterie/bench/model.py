"""Prefill and decoding of a model of random weights, shaped like Qwen3-30B-A3B, beside Transformers' own experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coterie.bench.decode import Decoder, Prefill
from coterie.bench.layer import OURS, check_peer
from coterie.bench.random_model import packed_twin, qwen3_30b, random_model
from coterie.bench.timing import take_turns
from coterie.errors import ArgumentError
from coterie.formats import resolve


@dataclass(frozen=True, slots=True)
class ModelResult:
    """Tokens per second of both, and ours / peer time of the median round (below 1: we are faster)."""

    work: str
    tokens_per_second: float
    peer_tokens_per_second: float
    ratio: float


def bench_model(
    format: str = "int4",
    group_size: int | None = None,
    zero_point: bool = False,
    layers: int = 4,
    vocabulary: int = 32768,
    prompt: int = 512,
    peer: str = "grouped_mm",
    seconds: float = 3.0,
    rounds: int = 5,
) -> list[ModelResult]:
    """Prefill of `prompt` tokens and decoding after them, one sequence. Memory: bf16 model + packed experts."""
    check_peer(peer)
    if prompt < 1:
        raise ArgumentError(f"prompt={prompt} tokens: expected at least 1")
    spec = resolve(format, group_size, zero_point)
    theirs = random_model(qwen3_30b(layers, vocabulary), peer)
    models = {OURS: packed_twin(theirs, spec), peer: theirs}
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(1))
    prefill = take_turns({name: Prefill(model, ids) for name, model in models.items()}, seconds, rounds)
    decode = take_turns({name: Decoder(model, ids) for name, model in models.items()}, seconds, rounds)
    return [
        ModelResult(work, tokens / turns.seconds(OURS), tokens / turns.seconds(peer), turns.ratio(OURS, peer))
        for work, tokens, turns in (("prefill", prompt, prefill), ("decode", 1, decode))
    ]
