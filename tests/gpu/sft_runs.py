"""Short fine-tuning runs of the bundled model, on any device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from coterie import tiny
from coterie.train import run
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
SHORT = {
    "base_model": str(tiny.PATH),
    "experts": "int8",
    "datasets": [{"path": str(DATA / "train.jsonl")}],
    "adapter": "lora",
    "lora_r": 4,
    "sequence_len": 64,
    "micro_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
}


def configure(output: Path, **changes: Any) -> TrainConfig:
    """A short run that writes to `output`; None takes a key away."""
    values = {**SHORT, "output_dir": str(output), **changes}
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return read_config(file)


def losses(config: TrainConfig, name: str = "loss") -> list[float]:
    """What a run logs under `name`, step by step."""
    run.train(config, Path(), Console(quiet=True))
    rows = map(json.loads, (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row]
