"""Short fine-tuning runs of the bundled model, on any device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from short_runs import metrics, write

from coterie.train.config import TrainConfig, read_config
from coterie.train.example import DATA

PREFERENCES = [{"path": str(DATA / "preferences.jsonl")}]
OBJECTIVES = {
    "supervised": {},
    "packed": {"sample_packing": True, "gradient_checkpointing": "retain_experts"},
    "dpo": {"rl": "dpo", "datasets": PREFERENCES, "gradient_checkpointing": True},
    "reward": {"reward_model": True, "datasets": PREFERENCES},
    "steps": {"process_reward_model": True, "datasets": [{"path": str(DATA / "steps.jsonl")}]},
    "unfrozen": {"adapter": None, "unfrozen_parameters": ["norm", r"layers\.1\.mlp\.gate"], "learning_rate": 0.01},
}


def configure(output: Path, **changes: Any) -> TrainConfig:
    """A short run that writes to `output`; None takes a key away."""
    return read_config(write(output.with_suffix(".yaml"), output, **changes))


def losses(config: TrainConfig, name: str = "loss") -> list[float]:
    """What a run logs under `name`, step by step."""
    return [row[name] for row in metrics(config) if name in row]
