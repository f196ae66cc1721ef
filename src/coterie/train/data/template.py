"""Chats as tokens, and which of them are the assistant's: what a chat template renders, and where answers lie in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coterie.errors import ArgumentError

MARKER = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
ASSISTANT = "assistant"
STOP = "<|im_end|>"
CHATML = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}\
{{ message.content }}<|im_end|>{% endif %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

Sample = tuple[list[int], list[bool]]  # tokens, and for each whether it is learnt


def set_template(tokenizer: Any, wanted: str | None, folder: Path) -> None:
    """Gives a tokenizer the chat template that a file names: chatml, a Jinja template or a file of one.

    Files are seen from `folder`. Raises ArgumentError.
    """
    if wanted is None:
        return
    if wanted == "chatml":
        # Where a vocabulary lacks ChatML's stop token, an answer ends in what the model stops at.
        known = STOP in tokenizer.get_vocab() or tokenizer.eos_token is None
        tokenizer.chat_template = CHATML if known else CHATML.replace(STOP, tokenizer.eos_token)
    elif "{" in wanted:
        tokenizer.chat_template = wanted
    elif (folder / wanted).is_file():
        tokenizer.chat_template = (folder / wanted).read_text(encoding="utf-8")
    else:
        raise ArgumentError(
            f"chat_template: expected chatml, a Jinja template or a file of one, found no file {folder / wanted}"
        )


class ChatTemplate:
    """A tokenizer's chat template. Raises ValueError, saying why, for chats that it does not render."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        template = tokenizer.chat_template
        text = template.get("default", "") if isinstance(template, dict) else template or ""
        self.has_markers = MARKER.search(text) is not None
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.stops = tuple(special | set(tokenizer.all_special_tokens))

    def render(self, messages: list[dict], tools: Any = None, asks: bool = False) -> str:
        """A chat as text; asks: up to where the next answer begins."""
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=asks)
        except Exception as error:  # templates are code, and raise what they like
            raise ValueError(f"the chat template refuses it: {error}") from error

    def samples(self, messages: list[dict], tools: Any = None, first: int = 0) -> list[Sample]:
        """A chat's answers from message `first` on as samples: one, or several where a template demands it.

        The mask is that of the template's own {% generation %} markers. Without them an answer is what follows the
        chat before it, rendered up to where an answer is asked for. A template that writes an answer otherwise once
        something follows it (drops its thinking, ends it by another token) makes a sample of its own of each such
        answer, which ends in it: the chat as the model will see it when it gives that answer. Where answers have no
        stop token, the special token that the next turn begins with is learnt as one.
        """
        if self.has_markers:
            return [self.marked(messages, tools, first)]
        full = self.stopped(messages, tools)
        shared: list[tuple[int, int]] = []
        apart: list[Sample] = []
        for i in range(first, len(messages)):
            if messages[i]["role"] != ASSISTANT:
                continue
            text = full if i + 1 == len(messages) else self.stopped(messages[: i + 1], tools)
            start, end = self.begin(messages[:i], text, tools), self.end(text)
            if full.startswith(text[:end]):
                shared.append((start, end))
            else:
                apart.append(self.tokens(text, [(start, end)]))
        return [*apart, self.tokens(full, shared)] if shared or not apart else apart

    def stopped(self, messages: list[dict], tools: Any) -> str:
        """A chat as text; after an answer without a stop token with the special token of a user's next turn."""
        text = self.render(messages, tools)
        if messages[-1]["role"] != ASSISTANT or self.end(text) < len(text) or text.endswith(self.stops):
            return text
        try:
            longer = self.render([*messages, {"role": "user", "content": "?"}], tools)
        except ValueError:
            return text
        return text + next((stop for stop in self.stops if longer.startswith(text + stop)), "")

    def whole(self, messages: list[dict], tools: Any = None) -> Sample:
        """A chat of which everything is learnt."""
        ids = self.tokenizer(self.render(messages, tools), add_special_tokens=False)["input_ids"]
        return ids, [True] * len(ids)

    def marked(self, messages: list[dict], tools: Any, first: int) -> Sample:
        """A chat with the mask of the template's markers."""
        self.render(messages, tools)
        made = self.tokenizer.apply_chat_template(
            messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = made["input_ids"], [bool(m) for m in made["assistant_masks"]]
        if first:
            _, after = self.tokens(self.render(messages, tools), [(self.begin(messages[:first], None, tools), 1 << 60)])
            mask = [m and a for m, a in zip(mask, after, strict=True)]
        return ids, mask

    def begin(self, before: list[dict], text: str | None, tools: Any) -> int:
        """Where the answer to the chat `before` begins in `text` (None: in what asks for it)."""
        try:
            asked = self.render(before, tools, asks=True)
            plain = self.render(before, tools)
        except ValueError:
            if before:
                raise
            asked = plain = ""  # most templates want a chat to begin with a question
        if text is None:
            return len(asked)
        start = common_length(asked, text)
        if start < len(plain.rstrip()):
            raise ValueError(
                "the chat template writes what precedes an answer otherwise once the answer follows, so that it cannot "
                "be told apart: mark answers by {% generation %} in chat_template, or set train_on_inputs: true"
            )
        return start

    def end(self, text: str) -> int:
        """Where the answer that ends `text` ends: at its stop token, or at the end."""
        stripped = text.rstrip()
        return len(stripped) if stripped.endswith(self.stops) else len(text)

    def tokens(self, text: str, spans: list[tuple[int, int]]) -> Sample:
        """The tokens of a text, those learnt that have a character in a span."""
        return tokens_of_spans(self.tokenizer, text, spans, special=False)


def tokens_of_spans(tokenizer: Any, text: str, spans: list[tuple[int, int]], special: bool) -> Sample:
    """The tokens of a text, those learnt that have a character in one of `spans`; special: with the tokenizer's own."""
    if not tokenizer.is_fast:
        raise ValueError("finding answers needs a fast tokenizer (tokenizer.json), which this model does not have")
    made = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    mask = [any(s < end and start < e for start, end in spans) for s, e in made["offset_mapping"]]
    return made["input_ids"], mask


def common_length(first: Sequence, second: Sequence) -> int:
    """How far two texts, or two lists of tokens, agree from their beginning."""
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)
