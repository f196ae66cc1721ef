"""A checkpoint that others quantised, or that is packed, as base_model: trained on in its own format."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from quantised_checkpoints import METHODS
from safetensors.torch import load_file, save_file

import coterie
from coterie import tiny
from coterie.convert import convert_cpu
from coterie.hf.modules import packed_modules


@pytest.mark.parametrize("method", ["fp8 by blocks", "GPTQ"])
def test_trains(configure, train, tmp_path, method):
    """The bundled model with experts of random codes of that method."""
    make, config, spec = METHODS[method]
    base = shutil.copytree(tiny.PATH, tmp_path / "base")
    stored = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(stored | {"quantization_config": config}))
    random, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in load_file(base / "model.safetensors").items():
        parts = {"weight": tensor}
        if re.search(r"experts\.\d+\.", name):
            parts, _ = make(random, *tensor.shape)
        tensors |= {f"{name.removesuffix('.weight')}.{part}": each.contiguous() for part, each in parts.items()}
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    rows = train(configure(base_model=str(base), experts=None))
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] < rows[0]["loss"]
    adapter = load_file(tmp_path / "output" / "adapter_model.safetensors")
    assert any(value.any() for name, value in adapter.items() if "experts" in name and "lora_B" in name)
    assert all(module.experts.spec == spec for _, module in packed_modules(coterie.from_pretrained(base)))


def test_packed(configure, train, tmp_path):
    convert_cpu(tiny.PATH, tmp_path / "base", "int4", 64)
    rows = train(configure(base_model=str(tmp_path / "base"), experts=None))
    assert rows[-1]["loss"] < rows[0]["loss"]
    adapter = json.loads((tmp_path / "output" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "base")
