"""Codes that share bytes, against what the order of their bits says, number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coterie.errors import ArgumentError
from coterie.fields import NONE, Field, spread

# Bytes of a block, its codes, and their fields: every way in which bits are ordered, below and above others.
CASES = [
    (18, 32, Field(2, 4, 16), NONE),
    (36, 64, Field(4, 4, 8), NONE),
    (34, 32, Field(2, 8, 32), NONE),
    (21, 42, Field(0, 4, 1), NONE),
    (22, 32, Field(6, 4, 16), Field(2, 1, 1)),
    (110, 256, Field(32, 2, 32), Field(0, 1, 32)),
    (176, 256, Field(48, 4, 32), Field(16, 1, 32)),
    (210, 256, Field(0, 4, 64), Field(128, 2, 32)),
]


def number_at(block: np.ndarray, field: Field, index: int) -> int:
    chunk, within = divmod(index, field.span * 8 // field.bits)
    part, byte = divmod(within, field.span)
    return int(block[field.at + chunk * field.span + byte]) >> part * field.bits & (1 << field.bits) - 1


@pytest.mark.parametrize(("nbytes", "count", "lower", "upper"), CASES)
@pytest.mark.parametrize("number", [1, 700])  # of blocks in a row: several threads take parts of the latter
def test_numbers_are_where_their_bits_say(nbytes, count, lower, upper, number):
    blocks = np.random.default_rng(0).integers(0, 256, (3, number, nbytes), dtype=np.uint8)
    found = spread(blocks, count, lower, upper).view(3, number, count)
    for row, block in ((0, 0), (1, number // 2), (2, number - 1)):
        own = blocks[row, block]
        expected = [
            number_at(own, lower, k) | (number_at(own, upper, k) << lower.bits if upper.bits else 0)
            for k in range(count)
        ]
        assert found[row, block].tolist() == expected


def test_signed_bytes():
    blocks = np.arange(-128, 128, dtype=np.int8).view(np.uint8).reshape(2, 4, 32)
    assert torch.equal(spread(blocks, 32, Field(0, 8, 32), flip=128).flatten(), torch.arange(256, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (np.zeros((2, 2, 17), np.uint8), "blocks of 17 bytes"),
        (np.zeros((2, 2, 36), np.uint8)[..., :18], "adjacent bytes"),
        (np.zeros((2, 2, 18), np.int8), "adjacent bytes, found int8"),
    ],
)
def test_other_blocks_are_refused(blocks, message):
    with pytest.raises(ArgumentError, match=message):
        spread(blocks, 32, Field(2, 4, 16))
