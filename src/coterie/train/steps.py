"""Process reward models: data of steps and labels into tokens, where each step's last token has its label."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import DataCollatorForTokenClassification, Trainer

from coterie.train.trainers import Steps

SEPARATOR = "\n"
IGNORED = -100


def step_trainer(train_dataset: Dataset, eval_dataset: Dataset | None, **options: Any) -> Trainer:
    """A Trainer of a token classifier, on rows of `prompt`, `completions` and `labels`."""
    tokenizer, args = options["processing_class"], options.pop("args")
    length, processes = options.pop("max_length"), options.pop("processes")

    def tokenize(rows: Dataset | None) -> Dataset | None:
        if rows is None:
            return None
        return rows.map(
            lambda row: tokens_of(row, tokenizer, length),
            remove_columns=rows.column_names,
            num_proc=processes,
            desc="Tokenizing",
        )

    return Steps(
        args=args,
        train_dataset=tokenize(train_dataset),
        eval_dataset=tokenize(eval_dataset),
        data_collator=DataCollatorForTokenClassification(tokenizer),
        **options,
    )


def tokens_of(row: dict[str, Any], tokenizer: Any, length: int) -> dict[str, list[int]]:
    """{input_ids, labels}, both [N <= length]: the prompt, then each step ending in a separator that has its label."""
    ids = tokenizer(row["prompt"] + SEPARATOR)["input_ids"]
    labels = [IGNORED] * len(ids)
    for step, label in zip(row["completions"], row["labels"], strict=True):
        tokens = tokenizer(step + SEPARATOR, add_special_tokens=False)["input_ids"]
        ids = ids + tokens
        labels = labels + [IGNORED] * (len(tokens) - 1) + [int(label)]
    return {"input_ids": ids[:length], "labels": labels[:length]}
