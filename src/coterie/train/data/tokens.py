"""Rows into tokens, and whether there is anything to learn from them: what is cut, and what is left out and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from trl import extract_prompt

from coterie.errors import ArgumentError
from coterie.train.config import DatasetConfig, TrainConfig
from coterie.train.data.formats import instruction_of, is_chat, message_of, messages_of
from coterie.train.data.steps import IGNORED, tokens_of
from coterie.train.data.template import ASSISTANT, ChatTemplate, Sample, common_length, tokens_of_spans

SHOWN = 5

EMPTY = "is empty"
UNANSWERED = "has no answer"
CUT_OFF = "loses all there is to learn when cut to sequence_len, which could be raised"
TOO_LONG = "is longer than sequence_len; reward models are not trained on parts"
SAME = "prefers what it rejects: both sides are equal"
ONE_SIDED = "has an empty side"
UNLABELLED = "has no label for each of its steps"


class NothingToLearn(Exception):
    """Why a row is left out."""


@dataclass
class Found:
    """One entry of `datasets` as it is trained on, and what happened to its rows (numbers from 1)."""

    source: str
    data: Dataset
    rows: int
    tokens: int = 0
    learnt: int = 0
    lost: int = 0
    cut: list[int] = field(default_factory=list)
    left_out: dict[str, list[int]] = field(default_factory=dict)

    def lines(self, length: int) -> list[str]:
        """What is to be said of it."""
        samples = f", as {len(self.data)} samples" if len(self.data) > self.rows else ""
        said = [f"{self.source}: {self.rows} rows{samples}, {self.tokens} tokens, {self.learnt} of them learnt"]
        if self.cut:
            said.append(
                f"{self.source}: {len(self.cut)} of {self.rows} rows are cut to sequence_len {length}, {self.lost} "
                f"tokens are lost ({numbers(self.cut)})"
            )
        return said + self.gaps()

    def gaps(self) -> list[str]:
        """What is said of the rows that are left out."""
        return [
            f"{self.source}: {len(rows)} of {self.rows} rows left out: each {reason} ({numbers(rows)})"
            for reason, rows in self.left_out.items()
        ]


def numbers(rows: list[int]) -> str:
    shown = ", ".join(map(str, rows[:SHOWN]))
    return f"row{'s' if len(rows) > 1 else ''} {shown}{' ...' if len(rows) > SHOWN else ''}"


def tokenise(rows: Dataset, kind: str, entry: DatasetConfig, config: TrainConfig, tokenizer: Any) -> Found:
    """The rows of an entry with input_ids and labels (preferences: as they are), without those that teach nothing.

    Raises ArgumentError for a row that is not what its kind says, by its number from 1.
    """
    reader = Reader(kind, entry, config, tokenizer)
    made = rows.map(
        reader,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        num_proc=config.dataset_processes,
        desc="Tokenizing",
        load_from_cache_file=False,
    )
    found = Found(entry.path, made, len(rows))
    columns = zip(made["row"][:], made["reason"][:], made["tokens"][:], made["learnt"][:], made["lost"][:], strict=True)
    kept = []
    for i, (row, reason, tokens, learnt, lost) in enumerate(columns):
        if lost and (not found.cut or found.cut[-1] != row):
            found.cut.append(row)
        found.lost += lost
        if reason:
            found.left_out.setdefault(reason, []).append(row)
            continue
        kept.append(i if kind != "preference" else row - 1)
        found.tokens += tokens
        found.learnt += learnt
    found.data = (
        rows.select(kept) if kind == "preference" else made.select(kept).select_columns(["input_ids", "labels"])
    )
    return found


class Reader:
    """What `Dataset.map` calls: a batch of rows and their positions -> their samples with counts."""

    def __init__(self, kind: str, entry: DatasetConfig, config: TrainConfig, tokenizer: Any) -> None:
        self.kind, self.entry, self.tokenizer = kind, entry, tokenizer
        self.length, self.learns_all = config.sequence_len, config.train_on_inputs
        self.cuts = not config.reward_model
        self.template = ChatTemplate(tokenizer)

    def __call__(self, batch: dict[str, list], positions: list[int]) -> dict[str, list]:
        made: dict[str, list] = {
            name: [] for name in ("row", "reason", "tokens", "learnt", "lost", "input_ids", "labels")
        }
        for i, position in enumerate(positions):
            row = {name: values[i] for name, values in batch.items()}
            for sample in self.samples(row, position + 1):
                for name, value in sample.items():
                    made[name].append(value)
        return made

    def samples(self, row: dict[str, Any], number: int) -> Iterator[dict[str, Any]]:
        """The samples of a row; of one to be left out, an empty one that has the reason."""
        nothing = {"row": number, "tokens": 0, "learnt": 0, "lost": 0, "input_ids": [], "labels": []}
        try:
            if self.kind == "preference":
                yield {**nothing, "reason": "", **self.preference(row)}
            elif self.kind == "stepwise":
                yield self.labelled(number, *self.steps(row))
            else:
                for ids, mask in self.supervised(row):
                    yield self.labelled(number, ids, [i if m else IGNORED for i, m in zip(ids, mask, strict=True)])
        except NothingToLearn as reason:
            yield {**nothing, "reason": str(reason)}
        except ValueError as error:
            raise ArgumentError(f"{self.entry.path}: row {number}: {error}") from error
        except (TypeError, AttributeError, KeyError) as error:
            raise ArgumentError(
                f"{self.entry.path}: row {number} cannot be read as {self.kind}: {type(error).__name__}: {error}"
            ) from error

    def labelled(self, number: int, ids: list[int], labels: list[int]) -> dict[str, Any]:
        """A sample, cut. The first token of a sequence is never learnt: nothing predicts it."""
        first = 0 if self.kind == "stepwise" else 1
        reason, lost = "", max(0, len(ids) - self.length)
        ids, kept = ids[: self.length], labels[: self.length]
        learnt = sum(label != IGNORED for label in kept[first:])
        if not learnt:
            reason = CUT_OFF if lost and any(label != IGNORED for label in labels[first:]) else UNANSWERED
        return {
            "row": number,
            "reason": reason,
            "tokens": len(ids),
            "learnt": learnt,
            "lost": lost,
            "input_ids": ids,
            "labels": kept,
        }

    def supervised(self, row: dict[str, Any]) -> list[Sample]:
        if self.kind == "completion":
            text = row[self.entry.field]
            if not text or not str(text).strip():
                raise NothingToLearn(EMPTY)
            ids = self.tokenizer(self.ended(str(text)))["input_ids"]
            return [(ids, [True] * len(ids))]
        if self.kind == "prompt_completion":
            prompt, completion = row["prompt"], row["completion"]
            if not completion or (isinstance(completion, str) and not completion.strip()):
                raise NothingToLearn(UNANSWERED)
            if not is_chat(completion):
                return [self.text_completion(prompt or "", completion)]
            if isinstance(prompt, str):
                prompt = [{"role": "user", "content": prompt}]
            before, after = messages_of(prompt, self.entry), messages_of(completion, self.entry)
            return self.chat([*before, *after], row.get("tools"), len(before))
        if self.kind == "alpaca":
            return self.chat(instruction_of(row), None)
        (messages,) = (value for name, value in row.items() if name != "tools")
        return self.chat(messages_of(messages, self.entry), row.get("tools"))

    def chat(self, messages: list[dict], tools: Any, first: int = 0) -> list[Sample]:
        if not messages:
            raise NothingToLearn(EMPTY)
        if self.learns_all:
            return [self.template.whole(messages, tools or None)]
        if not any(m["role"] == ASSISTANT and (m["content"] or "tool_calls" in m) for m in messages[first:]):
            raise NothingToLearn(UNANSWERED)
        return self.template.samples(messages, tools or None, first)

    def text_completion(self, prompt: str, completion: str) -> Sample:
        text = self.ended(prompt + completion)
        if self.learns_all:
            ids = self.tokenizer(text)["input_ids"]
            return ids, [True] * len(ids)
        return tokens_of_spans(self.tokenizer, text, [(len(prompt), len(text))], special=True)

    def ended(self, text: str) -> str:
        """The text with the token at which the model stops."""
        end = self.tokenizer.eos_token or ""
        return text if text.endswith(end) else text + end

    def preference(self, row: dict[str, Any]) -> dict[str, Any]:
        """The counts of a preference row, whose tokens TRL's trainer makes."""
        sides = row["chosen"], row["rejected"]
        if not all(side and (is_chat(side) or side.strip()) for side in sides):
            raise NothingToLearn(ONE_SIDED)
        if sides[0] == sides[1]:
            raise NothingToLearn(SAME)
        given = row if row.get("prompt") else extract_prompt(row)
        asked = given["prompt"]
        ids = [self.pair_tokens(asked, given[side]) for side in ("chosen", "rejected")]
        question = self.asked_tokens(asked) if self.cuts else []
        start = min(common_length(question, side) for side in ids)
        lost = sum(max(0, len(side) - self.length) for side in ids)
        if lost and not self.cuts:
            raise NothingToLearn(TOO_LONG)
        kept = [side[: self.length] for side in ids]
        if kept[0] == kept[1]:
            raise NothingToLearn(CUT_OFF)
        if any(len(side) <= start for side in kept):
            raise NothingToLearn(CUT_OFF if lost else ONE_SIDED)
        tokens = sum(map(len, kept))
        return {"tokens": tokens, "learnt": tokens - 2 * start, "lost": lost}

    def pair_tokens(self, prompt: Any, side: Any) -> list[int]:
        if is_chat(side):
            return self.template.whole([*self.messages(prompt), *self.messages(side)])[0]
        return self.tokenizer(self.ended(prompt + side))["input_ids"]

    def asked_tokens(self, prompt: Any) -> list[int]:
        if is_chat(prompt):
            text = self.template.render(self.messages(prompt), asks=True)
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.tokenizer(prompt)["input_ids"]

    def messages(self, value: list[dict]) -> list[dict]:
        return [message_of(message, self.entry) for message in value]

    def steps(self, row: dict[str, Any]) -> tuple[list[int], list[int]]:
        steps, labels = row["completions"] or [], row["labels"] or []
        if not row["prompt"] or not steps:
            raise NothingToLearn(EMPTY)
        if len(steps) != len(labels) or any(label is None for label in labels) or any(not step for step in steps):
            raise NothingToLearn(UNLABELLED)
        made = tokens_of(row, self.tokenizer)
        return made["input_ids"], made["labels"]
