"""Packed matrices in plain tensors: the values the kernels read, and the codes back again."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, matrix_shapes, name_of, options

from coterie import Experts
from coterie.gpu.stream import unpacked


def data_of(experts, name):
    start = 0 if name == "up" else experts.spec.matrix_nbytes(*experts.shape("up"))
    end = start + experts.spec.matrix_nbytes(*experts.shape(name))
    return torch.stack([experts.packed(e)[start:end] for e in range(experts.num_experts)])


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_values_and_codes(spec):
    """To the bit, for narrow last blocks and tiles, of experts in any order."""
    for rows, cols in matrix_shapes(spec):
        up, down = torch.randn(3, rows, cols), torch.randn(3, cols, rows)
        experts = Experts.pack(None, up, down, **options(spec))
        again = Experts.empty(3, cols, rows, format=spec, has_gate=False)
        for name in ("up", "down"):
            matrices = unpacked(spec, *experts.shape(name), data_of(experts, name))
            found = torch.empty(2, *experts.shape(name))
            matrices.dense(torch.tensor([2, 0]), found)
            expected = torch.stack([experts.dequantize_projection(name, e) for e in (2, 0)])
            assert torch.equal(found, expected), (name, rows, cols)
            rounded = found.bfloat16()
            matrices.dense(torch.tensor([2, 0]), rounded)
            assert torch.equal(rounded, expected.bfloat16())
            for e in range(3):
                again.pack_codes(name, e, *matrices.parts(e))
                assert torch.equal(again.dequantize_projection(name, e), experts.dequantize_projection(name, e))


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_as_small_as_in_ram(spec):
    """But for int4's zero points and codes that are no power of two nothing is wider: those of 4 bits lie two to a
    byte."""
    experts = Experts.pack(None, torch.randn(2, 256, 256), torch.randn(2, 256, 256), **options(spec))
    matrices = unpacked(spec, 256, 256, data_of(experts, "up"))
    wider = 256 * 256 * (8 - spec.encoding.bits) // 8 if spec.encoding.bits not in (4, 8, 16) else 0
    assert matrices.nbytes <= 2 * (spec.matrix_nbytes(256, 256) + wider)
