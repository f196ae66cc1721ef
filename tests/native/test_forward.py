"""The kernels of every instruction set, in every format, against plain torch."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, Batch, assert_close, dequantized, engine_truth, name_of, options, packed, token_errors

from coterie import Experts, reference
from coterie.formats import Format

# (experts, hidden, intermediate); columns of grouped formats are multiples of their group.
AWKWARD = [(1, 1, 1), (2, 1, 70), (3, 33, 17), (4, 100, 65), (5, 65, 130)]
GROUPED = [(1, 128, 128), (4, 128, 256), (3, 640, 128)]
HALF_GROUPS = [(3, 96, 160), (2, 32, 32)]  # the last activation group is not whole

# Up to a tile of rows and past it, for every tile height; one expert's 24 rows and more decode int4 to bytes.
BATCHES = [
    *(Batch(tokens, 1, spread=False) for tokens in (1, 2, 3, 4, 5, 6, 7, 8, 13, 16, 23, 24, 31, 33, 47, 64, 100)),
    *(Batch(tokens, top_k) for tokens in (0, 1, 2, 3, 5, 7, 16, 33) for top_k in (1, 2)),
    Batch(300, 3),
]


def shapes_of(spec: Format) -> list[tuple[int, int, int]]:
    if not spec.group_size or spec.encoding.pads:
        return AWKWARD + GROUPED[1:]
    return GROUPED + (HALF_GROUPS if spec.group_size <= 32 else [(2, 64, 192)] if spec.group_size == 64 else [])


def check(spec, isa, sizes, batch):
    if batch.top_k > sizes[0]:
        return
    x, ids, weights = batch.tensors(sizes)
    found = packed(spec, sizes)(x, ids, weights)
    truth = engine_truth(packed(spec, sizes), isa, x, ids, weights)
    assert found.shape == x.shape and found.dtype == x.dtype
    assert_close(spec, found, truth, (sizes, batch))


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_every_shape_and_batch(isa, spec):
    for number, sizes in enumerate(shapes_of(spec)):
        for batch in BATCHES if number % 2 else BATCHES[:: 2 if isa != "amx_emulated" else 3]:
            check(spec, isa, sizes, batch)


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_error_that_the_format_promises(isa, spec):
    """Against activations that are not rounded: bf16's rounding, or that of int8 activations and decoded int4."""
    sizes = (4, 256, 128)
    x, ids, weights = Batch(64, 4).tensors(sizes)
    found, truth = packed(spec, sizes)(x, ids, weights), reference.forward(x, ids, weights, *dequantized(spec, sizes))
    assert token_errors(found, truth).square().mean().sqrt() < (3e-2 if spec.encoding.int8_activations else 4e-3)


@pytest.mark.parametrize("largest", [(3, -4), (7, -8), (15, -16), (31, -32), (6, -6), (3, 0), (15, 0), (31, 0)])
@pytest.mark.parametrize("spec", [spec for spec in FORMATS if spec.encoding.int8_activations], ids=name_of)
def test_sums_of_the_largest_codes_with_the_largest_activations(isa, spec, largest):
    """Nothing overflows: every column has the largest code but for one of the other end in a group."""
    weights = torch.full((1, 256, 256), float(largest[0]))
    weights[..., ::16] = largest[1]
    experts = Experts.pack(None, weights, weights, **options(spec))
    for tokens in (1, 6, 17):
        x = torch.ones(tokens, 256) * torch.tensor([1.0, -1.0] * 9)[:tokens, None]
        batch = x, torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
        assert_close(spec, experts(*batch), engine_truth(experts, isa, *batch))


@pytest.mark.parametrize("spec", [FORMATS[0], FORMATS[1], FORMATS[6]], ids=name_of)
def test_every_number_of_experts_per_token(isa, spec):
    for top_k in range(1, 8):
        for tokens in (1, 9):
            check(spec, isa, (7, 64, 32), Batch(tokens, top_k))


@pytest.mark.parametrize("spec", [FORMATS[0], FORMATS[1]], ids=name_of)
def test_rows_longer_than_the_stack_buffer(isa, spec):
    check(spec, isa, (1, 16450, 3), Batch(3, 1))


def test_more_tokens_than_one_chunk(isa):
    """4096 tokens run at a time; the last one of a chunk and the first of the next are like any other."""
    spec, sizes = Format("int8"), (4, 16, 16)
    x, ids, weights = Batch(4099, 2).tensors(sizes)
    found = packed(spec, sizes)(x, ids, weights)
    truth = engine_truth(packed(spec, sizes), isa, x, ids, weights)
    assert_close(spec, found, truth)
    assert_close(spec, found[4090:], truth[4090:])
