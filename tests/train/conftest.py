from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import short_runs
import torch
import transformers

from coterie.train.config import TrainConfig, read_config

transformers.utils.logging.disable_progress_bar()
datasets.disable_progress_bars()
torch.set_num_threads(1)


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    """write(max_steps=8, ...) -> a YAML file of a short run with those changes; None takes a key away."""

    return lambda **changes: short_runs.write(tmp_path / "config.yaml", tmp_path / "output", **changes)


@pytest.fixture
def configure(write) -> Callable[..., TrainConfig]:
    """The same, read."""
    return lambda **changes: read_config(write(**changes))


@pytest.fixture
def train() -> Callable[[TrainConfig], list[dict]]:
    """Runs a configuration; its metrics that have a loss."""
    return lambda config: [row for row in short_runs.metrics(config) if "loss" in row]
