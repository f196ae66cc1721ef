"""Which models keep packed samples apart, found by trying a small copy of each family."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from coterie import tiny
from coterie.errors import ArgumentError
from coterie.train.checks import check_all
from coterie.train.packing import alone, check_packing, mixing, small_model

sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))
import tiny_models

MIXING = {
    # Masks are made without position ids, and Mamba's first kind does not ask for them.
    **dict.fromkeys(["gpt_oss", "afmoe", "jamba"], "depends on the samples before it"),
    **dict.fromkeys(  # convolutions need a kernel for GPUs
        ["qwen3_next", "qwen3_5_moe_text", "granitemoehybrid", "nemotron_h", "lfm2_moe", "kimi_linear"],
        "can't keep packed sequences apart",
    ),
}


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_families(family):
    config = AutoConfig.for_model(family, **{**tiny_models.COMMON, **tiny_models.FAMILIES[family]})
    model = small_model(config, trust_remote_code=False)
    assert alone(model).isfinite().all()
    reason = mixing(model)
    assert MIXING[family] in reason if family in MIXING else reason is None


HEADS_BY_LAYER = {
    "enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704,
    "hidden_size_per_layer_input": 0,
}  # fmt: skip


@pytest.mark.parametrize(("family", "changes"), [("mixtral", {}), ("gpt_oss", {}), ("gemma4_text", HEADS_BY_LAYER)])
def test_configs_of_full_size_are_made_small(family, changes):
    model = small_model(AutoConfig.for_model(family, **changes), trust_remote_code=False)
    assert sum(p.numel() for p in model.parameters()) < 2e7
    assert (mixing(model) is not None) == (family in MIXING)


def test_refused_before_training(configure, tmp_path):
    tiny_models.make("gpt_oss", vocab_size=2048).config.save_pretrained(tmp_path / "model")
    with pytest.raises(ArgumentError, match=r"sample_packing: GptOssForCausalLM does not keep packed samples apart"):
        check_packing(str(tmp_path / "model"), trust_remote_code=False, device=torch.device("cpu"))
    assert check_all(configure(sample_packing=True, base_model=str(tiny.PATH)), tmp_path).packing_tried
