"""Short fine-tuning runs of the bundled model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from coterie import tiny
from coterie.train import run
from coterie.train.config import TrainConfig
from coterie.train.example import DATA

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


def write(file: Path, output: Path, **changes: Any) -> Path:
    """The configuration of a short run that writes to `output`, as a YAML file; None takes a key away."""
    values = {**SHORT, "output_dir": str(output), **changes}
    file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return file


def metrics(config: TrainConfig) -> list[dict[str, Any]]:
    """Runs a configuration; what it logs, step by step."""
    run.train(config, Path(), Console(quiet=True))
    return [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()]
