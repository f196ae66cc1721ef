"""Rows of steps and labels into tokens, where each step's last token has its label: for process reward models."""

from __future__ import annotations

from typing import Any

SEPARATOR = "\n"
IGNORED = -100


def tokens_of(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """{input_ids, labels}, both [N]: the prompt, then each step ending in a separator that has its label."""
    ids = tokenizer(row["prompt"] + SEPARATOR)["input_ids"]
    labels = [IGNORED] * len(ids)
    for step, label in zip(row["completions"], row["labels"], strict=True):
        tokens = tokenizer(step + SEPARATOR, add_special_tokens=False)["input_ids"]
        ids = ids + tokens
        labels = labels + [IGNORED] * (len(tokens) - 1) + [int(label)]
    return {"input_ids": ids, "labels": labels}
