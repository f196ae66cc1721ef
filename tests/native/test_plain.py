"""Plain linear layers of a few tokens by the engine, beside torch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from coterie import _native, cpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "cols"), [(1, 16), (7, 48), (32, 64), (33, 160), (100, 272), (64, 1008)])
@pytest.mark.parametrize("tokens", [(1,), (2, 1), (3,), (4,), (7, 1), (16,)])
def test_products(rows, cols, tokens, dtype, each_isa):
    random = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(*size, generator=random).to(dtype) for size in ((*tokens, cols), (rows, cols), (rows,))
    )
    for isa in each_isa:
        for added in (None, bias):
            found = _native.plain_linear(x, weight, added)
            expected = F.linear(x.double(), weight.double(), None if added is None else added.double())
            assert found.dtype == dtype and found.shape == expected.shape
            error = (found - expected).abs().max() / expected.abs().max()
            assert error < (2**-8 if dtype == torch.bfloat16 else 1e-5), isa


def test_the_same_bits_for_any_number_of_threads(isa, threads):
    x, weight = torch.randn(3, 1, 96).bfloat16(), torch.randn(130, 96).bfloat16()
    found = []
    for count in (1, 2, 3):
        cpu.set_threads(count)
        found.append(_native.plain_linear(x, weight, None))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_tensors_that_do_not_fit_are_not_taken():
    x, weight = torch.randn(2, 32), torch.randn(8, 32)
    assert _native.plain_linear(x, weight, torch.ones(8)) is not None
    for other in (x.double(), x.bfloat16(), x[:, :16], x.t(), torch.randn(32, 2).t(), x.to("meta"), x[..., None]):
        assert _native.plain_linear(other, weight, None) is None
    for other in (weight[:, ::2], weight.t(), weight[0], weight.double(), weight.to_sparse()):
        assert _native.plain_linear(x, other, None) is None
    assert _native.plain_linear(torch.randn(2, 24), torch.randn(8, 24), None) is None
    assert _native.plain_linear(x, weight, torch.ones(7)) is None
