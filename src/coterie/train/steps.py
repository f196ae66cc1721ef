"""Process reward models: data of steps and labels into tokens, where each step's last token has its label."""

from __future__ import annotations

from typing import Any

from transformers import DataCollatorForTokenClassification, Trainer

from coterie.train.trainers import Steps

SEPARATOR = "\n"
IGNORED = -100


def step_trainer(**options: Any) -> Trainer:
    """A Trainer of a token classifier, on rows of input_ids and labels."""
    return Steps(data_collator=DataCollatorForTokenClassification(options["processing_class"]), **options)


def tokens_of(row: dict[str, Any], tokenizer: Any) -> dict[str, list[int]]:
    """{input_ids, labels}, both [N]: the prompt, then each step ending in a separator that has its label."""
    ids = tokenizer(row["prompt"] + SEPARATOR)["input_ids"]
    labels = [IGNORED] * len(ids)
    for step, label in zip(row["completions"], row["labels"], strict=True):
        tokens = tokenizer(step + SEPARATOR, add_special_tokens=False)["input_ids"]
        ids = ids + tokens
        labels = labels + [IGNORED] * (len(tokens) - 1) + [int(label)]
    return {"input_ids": ids, "labels": labels}
