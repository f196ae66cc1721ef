"""Loading takes the memory of what is kept: the bf16 model is never whole in memory, nor is a layer of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models

import coterie

SCRIPT = Path(__file__).with_name("peak_memory.py")
SLACK = 20 << 20


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
def test_peak(checkpoint, tmp_path):
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 32}
    model = tiny_models.make("qwen3_moe", **sizes)
    dense = sum(parameter.nbytes for parameter in model.parameters())
    assert dense > 190 << 20
    model.save_pretrained(tmp_path / "separate")
    model.save_pretrained(tmp_path / "stacked", save_original_format=False)
    del model
    coterie.from_pretrained(tmp_path / "separate").save_pretrained(tmp_path / "packed")
    folders = [str(tmp_path / name) for name in ("separate", "stacked", "packed")]
    command = [sys.executable, str(SCRIPT), str(checkpoint("qwen3_moe")), *folders]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured = [json.loads(line) for line in output.splitlines()]
    assert len(measured) == 3
    for row in measured:
        assert row["kept"] < dense / 3
        assert row["kept"] < row["peak"] < row["kept"] + SLACK
