"""Checkpoints that others quantised, by the method of the format that keeps them: their own codes, in slots."""

from __future__ import annotations

import pytest
import torch
from made_checkpoints import write_checkpoint
from quantised_checkpoints import METHODS, E, H, I, gpt_oss, quantised

from coterie import Experts
from coterie.kt import KTMoEWrapper

SLOTS = torch.tensor([2, 0, 1])
# The method of each format.
KT = {
    "int4": "GPTQ_INT4", "int8": "AMXINT8", "fp8_block": "FP8", "fp8_channel": "FP8_PERCHANNEL", "mxfp4": "MXFP4",
    "mxfp8": "MXFP8", "nvfp4": "NVFP4",
}  # fmt: skip


def assert_kept(folder, spec, layer):
    made = KTMoEWrapper(
        layer_idx=layer, num_experts=E, num_experts_per_tok=2, hidden_size=H, moe_intermediate_size=I,
        gpu_experts_mask=None, cpuinfer_threads=2, threadpool_count=1, weight_path=str(folder),
        chunked_prefill_size=64, method=KT[spec.name],
    )  # fmt: skip
    made.load_weights(SLOTS)
    opened = Experts.open(folder, layer)
    assert made.experts.spec == opened.spec == spec and made.experts.activation == opened.activation
    for slot, expert in enumerate(SLOTS.tolist()):
        assert torch.equal(made.experts.packed(slot), opened.packed(expert))
    for part, bias in opened.biases().items():
        assert torch.equal(made.experts.biases()[part], bias[SLOTS])


@pytest.mark.parametrize("method", METHODS)
def test_codes_are_kept(tmp_path, method):
    tensors, config, _ = quantised(method)
    assert_kept(write_checkpoint(tmp_path, tensors, config), METHODS[method][2], layer=1)


def test_gpt_oss(tmp_path):
    tensors, config, _ = gpt_oss()
    assert_kept(write_checkpoint(tmp_path, tensors, config), METHODS["compressed-tensors mxfp4"][2], layer=0)
