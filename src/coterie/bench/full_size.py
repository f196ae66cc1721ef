"""One model from its checkpoint: how long loading, prefill, decoding and a training step take, and how much memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import coterie
from coterie.bench.decode import Decoder, Prefill
from coterie.bench.memory import release, restart_peak, status
from coterie.bench.steps import with_lora

ADAPTED = ["q_proj", "v_proj"]  # by LoRA, with the experts
WARM = 16  # tokens of the first call, which is not timed


@dataclass(frozen=True, slots=True)
class Work:
    """What is measured: the sizes of it, in tokens, sequences, and the rank of LoRA."""

    prompt: int = 512
    decoded: int = 64
    sequences: int = 8
    trained: int = 256
    rank: int = 2


@dataclass(frozen=True, slots=True)
class Figures:
    """What one piece of work took.

    peak: bytes of RAM of the whole process at its highest, with the model and pages of its files that are mapped.
    tokens: that were computed in `seconds`; 0 for work that is not counted in tokens.
    ratio: for sequences decoded together, tokens per second over those of one sequence.
    """

    seconds: float
    peak: int
    tokens: int = 0
    ratio: float | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class FullSize:
    """The model of a checkpoint, loaded in the process that measures it. One method a piece of work."""

    def __init__(self, folder: Path, experts: str, dense: str | None, work: Work):
        self.work = work
        started = time.perf_counter()
        self.model = coterie.from_pretrained(folder, experts=experts, dense=dense)
        self.loading = Figures(time.perf_counter() - started, status("VmHWM"))
        release()

    def load(self) -> Figures:
        """From the checkpoint's files to a model that answers."""
        return self.loading

    def prefill(self) -> Figures:
        """One pass over a prompt."""
        Prefill(self.model, self._ids(1, WARM))()
        prefill = Prefill(self.model, self._ids(1, self.work.prompt))
        return _measured(prefill, self.work.prompt)

    def decode(self) -> Figures:
        """Tokens of one sequence, greedy, after its prompt."""
        return self._decoded(1)

    def together(self) -> Figures:
        """The same for several sequences at once, and for one of them in the same process."""
        one, several = self._decoded(1), self._decoded(self.work.sequences)
        return replace(several, ratio=several.tokens_per_second / one.tokens_per_second)

    def train(self) -> Figures:
        """A step of AdamW with LoRA on experts and attention, under gradient checkpointing."""
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model = with_lora(self.model, self.work.rank, ADAPTED).train()
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-5, fused=True)

        def step(tokens: int) -> None:
            ids = self._ids(1, tokens)
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            model.zero_grad()

        step(WARM)  # makes the optimizer's state, too
        return _measured(lambda: step(self.work.trained), self.work.trained)

    def _decoded(self, sequences: int) -> Figures:
        decoder = Decoder(self.model, self._ids(sequences, self.work.prompt), self.work.decoded + 1)
        decoder()

        def decode() -> None:
            for _ in range(self.work.decoded):
                decoder()

        return _measured(decode, sequences * self.work.decoded)

    def _ids(self, sequences: int, tokens: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(tokens)
        return torch.randint(self.model.config.vocab_size, (sequences, tokens), generator=random)


def _measured(work: Callable[[], Any], tokens: int) -> Figures:
    restart_peak()
    started = time.perf_counter()
    work()
    return Figures(time.perf_counter() - started, status("VmHWM"), tokens)
