"""Prefill and decoding of a model of random weights, shaped like a real one, beside Transformers' own experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from coterie import memory
from coterie.bench.decode import Decoder, Prefill
from coterie.bench.layer import OURS, check_peer
from coterie.bench.like import config_like
from coterie.bench.profile import Profile, profile_decode
from coterie.bench.random_model import packed_twin, random_model
from coterie.bench.timing import take_turns
from coterie.errors import ArgumentError
from coterie.formats import resolve
from coterie.hf.empty import empty_model
from coterie.hf.experts import NAME

NO_PEER = "none"


@dataclass(frozen=True, slots=True)
class ModelResult:
    """Tokens per second of both, and ours / peer time of the median round (below 1: we are faster); None: no peer."""

    work: str
    tokens_per_second: float
    peer_tokens_per_second: float | None = None
    ratio: float | None = None


class ModelBench:
    """A model, and the same with a peer's experts, which is whole in bf16; `prompt` tokens come before what is decoded.

    It computes as one that `coterie.from_pretrained` opens. layers: the first ones of `whole_layers`.
    """

    def __init__(
        self,
        like: str = "qwen3-30b",
        layers: int | None = 4,
        vocabulary: int | None = None,
        format: str = "int4",
        group_size: int | None = None,
        zero_point: bool = False,
        dense: str | None = None,
        prompt: int = 512,
        peer: str = "grouped_mm",
    ):
        if peer != NO_PEER:
            check_peer(peer)
        if prompt < 1:
            raise ArgumentError(f"prompt={prompt} tokens: expected at least 1")
        spec, linears = resolve(format, group_size, zero_point), resolve(dense) if dense else None
        config, self.whole_layers = config_like(like, layers, vocabulary)
        text = config.get_text_config()
        self.layers, self.vocabulary, self.prompt, self.peer = text.num_hidden_layers, text.vocab_size, prompt, peer
        if peer == NO_PEER:
            self.models = {OURS: random_model(config, NAME, spec, linears)}
        else:
            needed = 2 * empty_model(config).num_parameters()
            memory.require(needed, "the peer's model in bf16 (--peer none does without)")
            theirs = random_model(config, peer)
            self.models = {OURS: packed_twin(theirs, spec, linears), peer: theirs}
        self.ids = torch.randint(self.vocabulary, (1, prompt), generator=torch.Generator().manual_seed(1))

    def prefill(self, seconds: float = 3.0, rounds: int = 5) -> ModelResult:
        """One pass over the prompt."""
        return self._timed("prefill", Prefill, self.prompt, seconds, rounds)

    def decode(self, seconds: float = 3.0, rounds: int = 5) -> ModelResult:
        """One sequence, after the prompt."""
        return self._timed("decode", Decoder, 1, seconds, rounds)

    def profile(self) -> Profile:
        """Where the time of a decoded token goes."""
        return profile_decode(self.models[OURS], self.ids)

    def _timed(self, work: str, make: Any, tokens: int, seconds: float, rounds: int) -> ModelResult:
        turns = take_turns({name: make(model, self.ids) for name, model in self.models.items()}, seconds, rounds)
        ours = tokens / turns.seconds(OURS)
        if self.peer == NO_PEER:
            return ModelResult(work, ours)
        return ModelResult(work, ours, tokens / turns.seconds(self.peer), turns.ratio(OURS, self.peer))
