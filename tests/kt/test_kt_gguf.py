"""LLAMAFILE: the types of a GGUF file are kept; the other methods pack what they stand for in their own format."""

from __future__ import annotations

import pytest
import torch
from gguf_models import MIXED, E, H, I, write_experts
from kt_cases import close
from test_kt_loading import plain_checkpoint

from coterie import reference
from coterie.checkpoints.gguf_types import TYPES
from coterie.convert import convert_cpu
from coterie.errors import CheckpointError
from coterie.kt import KTMoEWrapper

SLOTS = torch.tensor([2, 0, 1])
INT8 = 0.025  # activations rounded to int8, twice


def wrapper(path, method="LLAMAFILE", **changed):
    made = KTMoEWrapper(
        layer_idx=0, num_experts=E, num_experts_per_tok=2, hidden_size=H, moe_intermediate_size=I,
        gpu_experts_mask=None, cpuinfer_threads=2, threadpool_count=1, weight_path=str(path), chunked_prefill_size=64,
        method=method, **changed,
    )  # fmt: skip
    made.load_weights(SLOTS)
    return made


def batch(tokens=5):
    random = torch.Generator().manual_seed(0)
    ids = torch.rand(tokens, E, generator=random).argsort(1)[:, :2].contiguous()
    return torch.randn(tokens, H, generator=random).bfloat16(), ids, torch.rand(tokens, 2, generator=random)


def expected(values, hidden, ids, weights):
    return reference.forward(hidden, SLOTS[ids], weights, *(values[part] for part in ("gate", "up", "down")))


@pytest.mark.parametrize("kind", sorted(name for name, kind in TYPES.items() if kind.codes is not None))
def test_types_are_kept(tmp_path, kind):
    file, values = write_experts(tmp_path / "model.gguf", kind)
    for path in (file, tmp_path):
        made = wrapper(path)
        assert made.experts.format == kind.lower()
        for found, part in zip(made.experts.dequantize(), ("gate", "up", "down"), strict=True):
            assert torch.equal(found, values[0][part][SLOTS])
    close(made.forward(*batch()), expected(values[0], *batch()), INT8)


def test_types_by_projection(tmp_path):
    file, values = write_experts(tmp_path / "model.gguf", {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"})
    made = wrapper(file)
    assert made.experts.format == "q4_k/q6_k"
    close(made.forward(*batch()), expected(values[0], *batch()), INT8)


@pytest.mark.parametrize("kind", ["F32", "BF16"])
def test_plain_weights_are_bf16(tmp_path, kind):
    file, values = write_experts(tmp_path / "model.gguf", kind)
    made = wrapper(file)
    assert made.experts.format == "bf16"
    close(made.forward(*batch()), expected(values[0], *batch()))


def test_what_is_packed_anew_is_said(tmp_path):
    file, _ = write_experts(tmp_path / "model.gguf", MIXED)
    with pytest.warns(UserWarning, match=r"codes that no format holds \(Q4_1\): .* packed anew as q8_0"):
        wrapper(file)


def test_packed_from_a_gguf_file(tmp_path):
    file, _ = write_experts(tmp_path / "model.gguf", {"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"})
    convert_cpu(file, tmp_path / "packed", layers=[0])
    assert torch.equal(wrapper(tmp_path / "packed").forward(*batch()), wrapper(file).forward(*batch()))


def test_other_methods_pack_in_their_own_format(tmp_path):
    file, values = write_experts(tmp_path / "model.gguf", "Q8_0")
    made = wrapper(file, "AMXINT8")
    assert made.experts.format == "int8"
    close(made.forward(*batch()), expected(values[0], *batch()), 0.03)


def test_what_is_no_gguf_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"method LLAMAFILE keeps the weights of GGUF files .* this is neither"):
        wrapper(plain_checkpoint(tmp_path))
