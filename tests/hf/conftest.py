from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers

import coterie

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a plain bf16 checkpoint of a family, made once."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family)
            tiny_models.make(family).save_pretrained(made[family])
        return made[family]

    return get


@pytest.fixture
def plain(checkpoint, tmp_path) -> Path:
    """A plain qwen3_moe checkpoint to break."""
    return shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "plain")


@pytest.fixture
def packed(checkpoint, tmp_path) -> Path:
    """A packed qwen3_moe checkpoint (int8) to break."""
    coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8").save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"
