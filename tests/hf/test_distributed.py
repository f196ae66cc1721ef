"""Two processes, each with its own packed experts and half of the batch, train what one process trains on all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruction_sets import FLOAT32
from lora_models import packed
from peft import PeftModel

from coterie import tiny

SCRIPT = Path(__file__).with_name("two_ranks.py")
# Half as many rows of an expert may be multiplied with codes as they are, where all of them are with codes made bf16.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Path:
    """The folder with what both processes left behind."""
    folder = tmp_path_factory.mktemp("ranks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(SCRIPT), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COTERIE_ISA": FLOAT32},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp, checkpointing"])
def test_two_ranks_train_like_one(kind, ran):
    result = json.loads((ran / "results.json").read_text())[kind]
    assert result["losses"] == pytest.approx(result["expected"], rel=TOLERANCE)
    assert result["expected"][-1] < 0.95 * result["expected"][0]
    assert result["gradient error"] < TOLERANCE, result["of"]


def test_sharding_packed_weights_is_refused(ran):
    error = json.loads((ran / "results.json").read_text())["error"]
    assert "is packed and cannot be sharded" in error and "ignored_params=coterie.hf.packed_parameters(model)" in error


def test_adapter_of_a_sharded_model(ran):
    model = PeftModel.from_pretrained(packed(tiny.PATH), ran / "adapter")
    state = torch.load(ran / "lora.pt")
    found = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)
