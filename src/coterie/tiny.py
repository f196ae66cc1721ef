"""The small Qwen3-MoE that ships with coterie: where it lies, the text it never saw, and how well it predicts it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

PATH = Path(__file__).parent / "data" / "tiny-qwen3-moe"
WINDOW = 256


def heldout_text() -> str:
    """English that was kept out of training: topics of the Python documentation."""
    return (PATH / "heldout.txt").read_text(encoding="utf-8")


def perplexity(model: Any, ids: torch.Tensor, window: int = WINDOW, batch: int = 8) -> float:
    """exp of the mean loss per token of a causal LM on `ids` [N] int64, cut into windows that do not see each other."""
    rows = ids[: len(ids) // window * window].view(-1, window)
    total = 0.0
    with torch.inference_mode():
        for part in rows.split(batch):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            total += loss.item()
    return math.exp(total / (rows.shape[0] * (window - 1)))
