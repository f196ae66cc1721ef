"""A gated MLP of three packed matrices is an expert that every token goes to, to the bit."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, dense, name_of, options, packed

from coterie import Experts, Linear, _native
from coterie.activations import KINDS, Activation

SIZES = (1, 128, 256)


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_the_bits_of_an_expert(isa, spec):
    experts = packed(spec, SIZES)
    parts = [Linear.pack(matrix[0], **options(spec)).weight for matrix in dense(SIZES)]
    for tokens in (1, 5, 16):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            found = _native.gated(*parts, x, Activation().native(), experts._layer.uses_int8())
            assert torch.equal(found, experts(x, torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation(isa, kind):
    gate, up, down = dense(SIZES)
    experts = Experts.pack(gate, up, down, format="bf16", activation=Activation(kind))
    parts = [Linear.pack(matrix[0], format="bf16").weight for matrix in (gate, up, down)]
    x = torch.randn(3, 128)
    found = _native.gated(*parts, x, Activation(kind).native(), False)
    assert torch.equal(found, experts(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)))
