from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import yaml
from rich.console import Console

from coterie import tiny
from coterie.train import run
from coterie.train.config import TrainConfig, read_config
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

transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()
torch.set_num_threads(1)


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """write(max_steps=8, ...) -> a YAML file of a short run with those changes; None takes a key away."""

    def write(**changes) -> Path:
        values = {**SHORT, "output_dir": str(tmp_path / "output"), **changes}
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
        return file

    return write


@pytest.fixture
def configure(write) -> Callable[..., TrainConfig]:
    """The same, read."""
    return lambda **changes: read_config(write(**changes))


@pytest.fixture
def train() -> Callable[[TrainConfig], list[dict]]:
    """Runs a configuration; its metrics that have a loss."""

    def train(config: TrainConfig) -> list[dict]:
        run.train(config, Path(), Console(quiet=True))
        lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if "loss" in row]

    return train
