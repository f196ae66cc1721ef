"""metrics.jsonl: what a trainer logs, one line a log; and a log in a line of text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

METRICS = "metrics.jsonl"
Row = dict[str, float]

# Losses without the router's, and what they are called; a row has one where `loss` is that and the router's.
OBJECTIVES = {"lm_loss": "language model", "dpo_loss": "DPO"}


class MetricsFile(TrainerCallback):
    """Appends what the trainer logs to metrics.jsonl, one line a log; a resumed run goes on where it had stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step] if state.global_step else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs:
            row = {"step": state.global_step, **logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[Row]:
    """The lines of a metrics.jsonl, but for one that was cut off at its end; none where there is no file."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def shown(row: Row) -> str | None:
    """The losses of a row: "loss 0.7340 (DPO 0.6931, router 0.0409)"; None where it has none."""
    if "loss" not in row:
        return f"evaluation loss {row['eval_loss']:.4f}" if "eval_loss" in row else None
    text = f"loss {row['loss']:.4f}"
    for name, title in OBJECTIVES.items():
        if name in row:
            text += f" ({title} {row[name]:.4f}, router {row['loss'] - row[name]:.4f})"
    return text
