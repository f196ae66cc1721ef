"""One token's attention to cached keys and values, beside the same in plain torch."""

from __future__ import annotations

import pytest
import torch

from coterie import _native, reference

# Sequences, query heads, heads of keys and values, positions, their widths. Groups of 8, 4, 2 and 1 heads and what is
# left over; parts of 256 positions and less; one position; widths that are no whole lines.
SHAPES = [
    (1, 32, 4, 513, 128, 128),
    (2, 7, 1, 33, 64, 48),
    (3, 12, 2, 300, 96, 16),
    (1, 5, 5, 1, 16, 64),
    (2, 30, 2, 256, 32, 144),
]
ERROR = {torch.bfloat16: 0.004, torch.float32: 2e-6}


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys with room behind their positions, values with their positions outside of their heads."""
    sequences, heads, shared, positions, width, value_width = shape
    random = torch.Generator().manual_seed(positions)
    query = torch.randn(sequences, heads, 1, width, generator=random).to(dtype)
    keys = torch.randn(sequences, shared, positions + 9, width, generator=random).to(dtype)[:, :, :positions]
    values = torch.randn(sequences, positions, shared, value_width, generator=random).to(dtype).transpose(1, 2)
    return query, keys, values


def masks(sequences: int, positions: int) -> list[torch.Tensor | None]:
    some = torch.rand(sequences, 1, 1, positions, generator=torch.Generator().manual_seed(1)) > 0.3
    some[..., positions // 2] = True
    return [None, some, some[:1]]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("shape", SHAPES)
def test_beside_plain_torch(shape, dtype, each_isa):
    query, keys, values = tensors(shape, dtype)
    cases = masks(shape[0], shape[3])
    expected = [reference.attend(query, keys, values, mask, 0.3) for mask in cases]
    for isa in each_isa:
        for mask, out in zip(cases, expected, strict=True):
            found = _native.attend(query, keys, values, mask, 0.3)
            assert found.dtype == dtype and found.shape == (shape[0], 1, shape[1], shape[5])
            assert relative(found.float(), out.transpose(1, 2)) < ERROR[dtype], isa


@pytest.mark.parametrize("dtype", ERROR)
def test_sinks_and_masks_that_are_added(dtype, isa):
    query, keys, values = tensors((2, 12, 2, 300, 64, 48), dtype)
    sinks = torch.randn(12, generator=torch.Generator().manual_seed(2)).to(dtype) * 3
    mask = masks(2, 300)[1]
    added = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    expected = reference.attend(query, keys, values, mask, 0.3, sinks).transpose(1, 2)
    for sink in (sinks, torch.nn.Parameter(sinks)):
        assert relative(_native.attend(query, keys, values, added, 0.3, sink).float(), expected) < ERROR[dtype]
        assert relative(_native.attend(query, keys, values, mask, 0.3, sink).float(), expected) < ERROR[dtype]


def test_scores_that_are_far_apart(isa):
    query, keys, values = tensors((1, 4, 1, 600, 64, 64), torch.float32)
    query *= 1000.0
    found = _native.attend(query, keys, values, None, 1.0)
    assert relative(found, reference.attend(query, keys, values, None, 1.0).transpose(1, 2)) < 1e-5


def test_a_sequence_that_may_look_at_nothing_gets_zeros(isa):
    query, keys, values = tensors((2, 4, 2, 300, 64, 64), torch.float32)
    mask = torch.ones(2, 1, 1, 300, dtype=torch.bool)
    mask[1] = False
    found = _native.attend(query, keys, values, mask, 1.0)
    assert found[0].abs().min() > 0 and not found[1].any()


def test_the_same_bits_for_any_number_of_threads(threads):
    import coterie

    query, keys, values = tensors((2, 16, 2, 1500, 128, 128), torch.bfloat16)
    found = []
    for count in (1, 2, 5):
        coterie.cpu.set_threads(count)
        found.append(_native.attend(query, keys, values, None, 0.1))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_what_it_does_not_take_is_left_to_torch():
    query, keys, values = tensors((1, 4, 2, 32, 64, 64), torch.float32)
    mask = torch.ones(1, 1, 1, 32, dtype=torch.bool)
    refused = [
        (query.half(), keys.half(), values.half(), None),
        (query, keys.bfloat16(), values, None),
        (query[:, :3], keys, values, None),
        (query[..., :40], keys[..., :40], values, None),
        (query, keys, values[..., ::2], None),
        (query.expand(1, 4, 2, 64), keys, values, None),
        (query, keys, values[:, :, :31], None),
        (query, keys, values, mask.float()),  # ones: a bias
        (query, keys, values, mask.long()),
        (query, keys, values, mask[..., :31]),
        (query, keys, values, mask.expand(1, 4, 1, 32)),
        (query[0], keys, values, None),
        (query.to("meta"), keys, values, None),
    ]
    for case in refused:
        assert _native.attend(*case, 1.0) is None
