"""Triton's kernels for a decoded token, on a GPU or in Triton's interpreter, against plain torch."""

from __future__ import annotations

import pytest
import torch
from gradient_cases import relative
from torch.nn import functional as F

pytest.importorskip("triton", reason="no Triton")

from coterie.gpu.kernels import token

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = (torch.bfloat16, torch.float32)
ROUNDING = {torch.bfloat16: 2**-8, torch.float32: 1e-5}


def randn(*size, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rounded", "from_one"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("cols", [1, 96, 128, 2048])
def test_rms_norm(dtype, rounded, from_one, cols):
    x, weight = randn(3, 1, 2, cols, dtype=dtype) * 3, randn(cols, dtype=dtype)
    found = token.rms_norm(x, weight, 1e-5, rounded, from_one)
    values = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-5)
    values = values.to(dtype).float() if rounded else values
    expected = (values * (weight.float() + from_one)).to(dtype)
    assert found.dtype == dtype and found.shape == x.shape
    torch.testing.assert_close(found, expected, rtol=2 * ROUNDING[dtype], atol=1e-6)


def test_rms_norm_of_what_is_not_taken():
    assert token.rms_norm(randn(2, 8).half(), randn(8), 1e-5, True, False) is None
    assert token.rms_norm(randn(8, 2).T, randn(8), 1e-5, True, False) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (6, 3), (60, 4), (128, 8), (512, 10)])
def test_choose(dtype, normalised, experts, top_k):
    logits = randn(5, experts, dtype=dtype)
    weights, ids = token.choose(logits, top_k, normalised, dtype)
    expected, chosen = logits.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
    expected, chosen = expected[:, :top_k], chosen[:, :top_k]
    expected = expected / expected.sum(-1, keepdim=True) if normalised else expected
    assert weights.dtype == dtype and torch.equal(ids, chosen)
    torch.testing.assert_close(weights.float(), expected, rtol=ROUNDING[dtype], atol=1e-6)


def test_choose_of_what_is_no_number():
    """Experts that there are, as torch gives them."""
    logits = torch.full((1, 6), float("nan"), device=DEVICE)
    weights, ids = token.choose(logits, 3, True, torch.float32)
    assert weights.isnan().all() and (ids >= 0).all() and (ids < 6).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [1, 63, 300, 1100])
@pytest.mark.parametrize(
    ("heads", "shared", "width", "value_width"), [(4, 4, 64, 64), (8, 2, 96, 96), (16, 1, 192, 128)]
)
@pytest.mark.parametrize("masked", [False, True])
def test_attend(dtype, positions, heads, shared, width, value_width, masked):
    """Keys and values as a cache has them; some positions of each sequence are not seen, and one sees nothing."""
    query = randn(3, 1, heads, width, dtype=dtype).transpose(1, 2)
    key, value = randn(3, shared, positions, width, dtype=dtype), randn(3, shared, positions, value_width, dtype=dtype)
    mask = None
    if masked:
        mask = torch.arange(positions, device=DEVICE) < torch.tensor([[0], [1], [(positions + 1) // 2]], device=DEVICE)
        mask[2, : positions // 4] = False
        mask = mask[:, None, None]
    found = token.attend(query, key, value, mask, 0.1)
    repeated = (t.float().repeat_interleave(heads // shared, 1) for t in (key, value))
    expected = F.scaled_dot_product_attention(query.float(), *repeated, attn_mask=mask, scale=0.1).transpose(1, 2)
    assert found.shape == expected.shape and found.dtype == dtype
    if masked:
        assert not found[0].any()
        found, expected = found[1:], expected[1:]
    assert relative(found.float(), expected) < (0.01 if dtype == torch.bfloat16 else 1e-5)


def test_attend_to_a_part_of_what_is_in_memory():
    memory, query = randn(2, 2, 100, 2, 64), randn(2, 4, 1, 64)
    key, value = memory[:, :, :70, 0], memory[:, :, :70, 1]
    expected = token.attend(query, key.contiguous(), value.contiguous(), None, 0.1)
    assert torch.equal(token.attend(query, key, value, None, 0.1), expected)
    one = torch.ones(1, 1, 1, 70, dtype=torch.bool, device=DEVICE)
    torch.testing.assert_close(token.attend(query, key, value, one, 0.1), expected)


@pytest.mark.parametrize("change", ["several tokens", "float mask", "heads", "fp16", "strides"])
def test_attention_that_is_not_taken(change):
    query, key, value, mask = randn(1, 4, 1, 64), randn(1, 2, 8, 64), randn(1, 2, 8, 64), None
    if change == "several tokens":
        query = randn(1, 4, 2, 64)
    elif change == "float mask":
        mask = torch.zeros(1, 1, 1, 8, device=DEVICE)
    elif change == "heads":
        query = randn(1, 3, 1, 64)
    elif change == "fp16":
        query, key, value = query.half(), key.half(), value.half()
    else:
        key = randn(1, 2, 64, 8).mT
    assert token.attend(query, key, value, mask, 0.1) is None
