"""A conversation with a model: its history, what is shown while it answers, and how fast it was."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jinja2
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from coterie.errors import ArgumentError
from coterie.hf.inference import cache
from coterie.serve.opening import context_length
from coterie.serve.thinking import OPEN, Thinking

Show = Callable[[str, bool], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer, and what it took.

    text: without what was thought. prompt_tokens: of the whole prompt; computed_tokens: those of them that earlier
    answers had not left in the cache. ended: "stop", "length" or "interrupted".
    """

    text: str
    prompt_tokens: int
    computed_tokens: int
    tokens: int
    prompt_seconds: float
    seconds: float
    ended: str


class Conversation:
    """What was said so far, and the model that answers.

    A model without a chat template continues text instead: each `ask` is a text of its own, without history.
    settings: how tokens are chosen; its `max_new_tokens` is the most that an answer has.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig, system: str | None = None
    ) -> None:
        self.has_template = tokenizer.chat_template is not None
        if system is not None and not self.has_template:
            raise ArgumentError("expected a model with a chat template for a system prompt: this one has none")
        self.model, self.tokenizer, self.settings, self.system = model, tokenizer, settings, system
        self.context = context_length(model)
        self.restart()

    def restart(self) -> None:
        """Forgets all but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system is not None else []
        self._drop_cache()

    def ask(self, text: str, show: Show) -> Answer:
        """The model's answer; show(piece, is_thought) is called as it comes. KeyboardInterrupt ends it early.

        Raises ArgumentError, and remembers nothing, where the template refuses the messages or the context is full.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self._prompt(messages if self.has_template else text)
        room = self.settings.max_new_tokens
        if self.context is not None:
            if len(ids) >= self.context:
                raise ArgumentError(
                    f"the conversation has {len(ids)} tokens, the model's context is {self.context}: start a new one"
                )
            room = min(room, self.context - len(ids))
        if self._cache is not None and not cache.has_room(self._cache, len(ids) + room):
            self._drop_cache()
        shown = Shown(self.tokenizer, show, self.tokenizer.decode(ids[-16:]).rstrip().endswith(OPEN))
        computed = len(ids) - self._reuse(ids)
        start = time.perf_counter()
        try:
            out = self.model.generate(
                input_ids=torch.tensor([ids], device=self.model.device),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=self.model.device),
                generation_config=self.settings,
                max_new_tokens=room,
                return_dict_in_generate=True,
                streamer=shown,
                **{cache.NAME: self._cache},
            )
            self._cache, self._cached = out[cache.NAME], out.sequences[0, :-1].tolist()
            ended = "length" if shown.tokens >= room else "stop"
        except KeyboardInterrupt:
            self._drop_cache()  # its layers may be of different lengths
            shown.end()
            ended = "interrupted"
        except BaseException:
            self._drop_cache()
            raise
        end = time.perf_counter()
        first = shown.first or end
        if self.has_template:
            self.messages = [*messages, {"role": "assistant", "content": shown.answer.strip()}]
        return Answer(shown.answer, len(ids), computed, shown.tokens, first - start, end - first, ended)

    def _prompt(self, said: list[dict[str, str]] | str) -> list[int]:
        if isinstance(said, str):
            return self.tokenizer(said)["input_ids"]
        try:
            rendered = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=True)
        except jinja2.TemplateError as error:
            raise ArgumentError(f"the model's chat template refuses these messages: {error}") from error
        return rendered["input_ids"]

    def _reuse(self, ids: list[int]) -> int:
        """How many tokens of the prompt the cache holds, once what differs is cut off: fewer than there are."""
        same = 0
        for cached, wanted in zip(self._cached, ids[:-1], strict=False):
            if cached != wanted:
                break
            same += 1
        surplus = len(self._cached) - same
        if surplus and cache.cut(self._cache, surplus):
            self._cached = self._cached[:same]
        elif surplus:
            self._drop_cache()
        return len(self._cached)

    def _drop_cache(self) -> None:
        self._cache, self._cached = None, []


class Shown(TextStreamer):
    """Shows tokens as text when they arrive, and counts them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Show, thinking: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.thinking = show, Thinking(thinking)
        self.answer = ""
        self.tokens = 0
        self.first = 0.0  # when the first token was there

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.first = self.first or time.perf_counter()
            self.tokens += value.numel()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        pieces = [*self.thinking.feed(text), *(self.thinking.end() if stream_end else ())]
        for piece, thought in pieces:
            self.answer += "" if thought else piece
            self.show(piece, thought)
