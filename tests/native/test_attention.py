"""One token's attention to cached keys and values, beside the same in plain torch."""

from __future__ import annotations

import pytest
import torch

import coterie
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


# Sequences, query heads, heads of keys and values, tokens, positions, their widths: tiles of 64 tokens and what is left
# over, chunks of 256 positions, blocks of 64 that are not whole.
PROMPTS = [
    (1, 4, 2, 70, 70, 32, 48),
    (2, 6, 2, 33, 300, 64, 80),
    (1, 2, 2, 130, 600, 48, 16),
    (2, 3, 1, 2, 2, 16, 64),
]


def prompt(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    sequences, heads, shared, tokens, positions, width, value_width = shape
    random = torch.Generator().manual_seed(positions)
    query = torch.randn(sequences, tokens, heads, width, generator=random).bfloat16().transpose(1, 2)
    keys = torch.randn(sequences, shared, positions + 9, width, generator=random).bfloat16()[:, :, :positions]
    values = torch.randn(sequences, positions, shared, value_width, generator=random).bfloat16().transpose(1, 2)
    return query, keys, values


def causal(tokens: int, positions: int) -> torch.Tensor:
    return torch.ones(1, 1, tokens, positions, dtype=torch.bool).tril(positions - tokens)


def attended(query, keys, values, mask, sinks=None) -> torch.Tensor:
    """Token by token, by the reference."""
    return torch.cat(
        [
            reference.attend(query[:, :, t : t + 1], keys, values, mask[:, :, t : t + 1], 0.3, sinks)
            for t in range(query.shape[2])
        ],
        dim=2,
    )


@pytest.mark.parametrize("shape", PROMPTS)
def test_prompts(shape, each_isa):
    query, keys, values = prompt(shape)
    sequences, heads, _, tokens, positions, _, _ = shape
    below = causal(tokens, positions)
    some = torch.rand(sequences, 1, tokens, positions, generator=torch.Generator().manual_seed(1)) > 0.3
    some = some & below | torch.eye(tokens, positions, dtype=torch.bool).roll(positions - tokens, 1)
    sliding = below & ~causal(tokens, positions).roll(-20, 2) if positions > 100 else below
    added = torch.zeros(some.shape, dtype=torch.bfloat16).masked_fill(~some, torch.finfo(torch.bfloat16).min)
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(2)) * 3
    cases = [(some, some, None), (added, some, sinks), (sliding, sliding, sinks.bfloat16())]
    if tokens == positions:
        cases.append((None, below, None))
    expected = [attended(query, keys, values, mask, sink) for _, mask, sink in cases]
    for isa in each_isa:
        for (given, _, sink), out in zip(cases, expected, strict=True):
            found = _native.attend_prompt(query, keys, values, given, 0.3, sink)
            assert found.dtype == torch.bfloat16 and found.shape == (sequences, tokens, heads, shape[6])
            assert relative(found.float(), out.transpose(1, 2)) < 0.005, isa


def test_prompts_with_scores_that_are_far_apart(isa):
    query, keys, values = prompt((1, 2, 1, 300, 300, 32, 32))
    query *= 100
    expected = attended(query, keys, values, causal(300, 300))
    assert relative(_native.attend_prompt(query, keys, values, None, 0.3).float(), expected.transpose(1, 2)) < 0.01


def test_prompts_that_may_look_at_nothing_get_zeros(isa):
    query, keys, values = prompt((1, 2, 1, 70, 70, 32, 32))
    mask = causal(70, 70)
    mask[:, :, 3] = False
    found = _native.attend_prompt(query, keys, values, mask, 0.3)
    assert not found[:, 3].any() and found[:, 4].any()


def test_prompts_have_the_same_bits_for_any_number_of_threads(isa, threads):
    given = prompt((2, 4, 2, 150, 150, 32, 32))
    found = []
    for count in (1, 2, 3):
        coterie.cpu.set_threads(count)
        found.append(_native.attend_prompt(*given, None, 0.3))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_other_prompts_are_not_taken():
    query, keys, values = prompt((1, 4, 2, 20, 20, 32, 32))
    assert _native.attend_prompt(query, keys, values, None, 0.3) is not None
    mask = causal(20, 20)
    for q, k, v, m in (
        (query.float(), keys.float(), values.float(), None),
        (query[:, :3], keys, values, None),
        (query[:, :, :1], keys, values, mask[:, :, :1]),
        (query[:, :, :5], keys, values, None),  # causal, and of other positions than its own
        (query[..., :24], keys[..., :24], values, None),
        (query, keys, values, mask[..., :19]),
        (query, keys, values, mask.float()),  # added: 0 and 1
        (query, keys, values, mask.expand(1, 4, 20, 20)),
    ):
        assert _native.attend_prompt(q, k, v, m, 0.3) is None
