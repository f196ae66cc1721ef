"""A checkpoint that another method quantised is named as such, and never read as if it were plain."""

import json

import pytest
import torch
from made_checkpoints import CONFIG, fused, random_experts, separate, two_layers, write_checkpoint

from coterie import Experts
from coterie.convert import convert_cpu
from coterie.errors import CheckpointError

METHODS = ["bitsandbytes", "hqq"]
READ = ["fp8", "mxfp4", "compressed-tensors", "modelopt", "gptq", "awq", "auto-round"]


def refused(folder, message):
    with pytest.raises(CheckpointError, match=message):
        Experts.open(folder)
    with pytest.raises(CheckpointError, match=message):
        convert_cpu(folder, folder.parent / "out")
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("nested", [False, True], ids=["top", "text_config"])
def test_the_config_names_it(tmp_path, method, nested):
    """Experts whose tensors look plain are refused all the same."""
    folder, _ = two_layers(tmp_path / "in")
    config = CONFIG | {"quantization_config": {"quant_method": method, "bits": 4}}
    (folder / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    refused(
        folder,
        f"in is quantised by {method}: this version reads bf16, fp16 and f32, and what .* {', '.join(READ)}; use",
    )


@pytest.mark.parametrize("method", READ)
@pytest.mark.parametrize("nested", [False, True], ids=["top", "text_config"])
def test_plain_experts_of_a_method_that_is_read(tmp_path, method, nested):
    """What has been left out of the quantisation is plain."""
    folder, layers = two_layers(tmp_path / "in")
    options = {"weight_block_size": [128, 128], "packing_format": "auto_round:auto_gptq"}
    config = CONFIG | {"quantization_config": {"quant_method": method} | options}
    (folder / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    experts = Experts.open(folder, 1)
    assert experts.format == "bf16"
    for found, name in zip(experts.dequantize(), ("gate", "up", "down"), strict=True):
        assert torch.equal(found, layers[1][name].float())
    assert convert_cpu(folder, tmp_path / "out").formats.name == "int4"


def test_packed_but_no_layers(tmp_path):
    folder, _ = two_layers(tmp_path / "in")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "coterie"}}))
    refused(folder, "says that coterie packed it, but holds no packed layers")


def test_modelopt(tmp_path):
    tensors = separate(STEM, {part: w.to(torch.float8_e5m2) for part, w in random_experts(0).items()})
    folder = write_checkpoint(tmp_path / "in", tensors)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    refused(folder, "in no quantised format that this version reads")


def test_stacks_of_fp8(tmp_path):
    tensors = fused(STEM, {part: w.to(torch.float8_e4m3fn) for part, w in random_experts(0).items()})
    tensors |= {f"{name}_scale_inv": torch.ones(3, 1, 1) for name in tensors}
    config = CONFIG | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    folder = write_checkpoint(tmp_path / "in", tensors, config)
    refused(folder, r"in no quantised format that this version reads: .*gate_up_proj' F8_E4M3 \[3, 64, 64\]")


STEM = "model.layers.0.mlp.experts"
TENSORS = {
    "GPTQ": {f"{STEM}.0.up_proj.qweight": torch.zeros(4, 4, dtype=torch.int32)},
    "FP8": {f"{STEM}.0.up_proj.weight_scale_inv": torch.zeros(1, 1)},
    "MXFP4": {f"{STEM}.gate_up_proj_blocks": torch.zeros(2, 2, dtype=torch.uint8)},
    "compressed-tensors": {f"{STEM}.0.up_proj.weight_packed": torch.zeros(4, 4, dtype=torch.int32)},
}


@pytest.mark.parametrize("method", TENSORS)
@pytest.mark.parametrize("plain", [False, True], ids=["alone", "beside plain experts"])
def test_the_tensors_name_it(tmp_path, method, plain):
    tensors = TENSORS[method] | (separate(STEM, random_experts(0)) if plain else {})
    refused(write_checkpoint(tmp_path / "in", tensors), f"quantised by .*{method}.*{next(iter(TENSORS[method]))}")
