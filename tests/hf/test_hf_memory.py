"""Loading takes the memory of what is kept: the bf16 model is never whole in memory, nor is a layer of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file

import coterie

SCRIPT = Path(__file__).with_name("peak_memory.py")
SLACK = 20 << 20


def quantise(plain: Path, folder: Path) -> None:
    """FP8 by rows, experts and attention, all scales 1."""
    shutil.copytree(plain, folder)
    tensors = {}
    for name, weight in load_file(plain / "model.safetensors").items():
        tensors[name] = weight
        if "experts" in name or "_proj" in name:
            tensors[name] = weight.to(torch.float8_e4m3fn)
            tensors[f"{name.removesuffix('.weight')}.weight_scale"] = torch.ones(len(weight), 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors"}
    (folder / "config.json").write_text(json.dumps(config))


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
    quantise(tmp_path / "separate", tmp_path / "quantised")
    folders = [str(tmp_path / name) for name in ("separate", "stacked", "packed", "quantised")]
    command = [sys.executable, str(SCRIPT), str(checkpoint("qwen3_moe")), *folders]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    measured = [json.loads(line) for line in output.splitlines()]
    assert len(measured) == 4
    for row in measured:
        assert row["kept"] < dense / (3 if row is not measured[3] else 1.8)
        assert row["kept"] < row["peak"] < row["kept"] + SLACK
