"""What `gpu_experts` stands for."""

from __future__ import annotations

import pytest
import torch

from coterie.errors import ArgumentError
from coterie.gpu.choice import chosen, read, streamed

MASK = torch.tensor([[True, False, False, True], [False] * 4, [True] * 4])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, [(), (), ()]),
        ("stream", [(), (), ()]),
        ("all", [(0, 1, 2, 3)] * 3),
        (0, [()] * 3),
        (2, [(0, 1)] * 3),
        (4, [(0, 1, 2, 3)] * 3),
        (0.5, [(0, 1)] * 3),
        (1.0, [(0, 1, 2, 3)] * 3),
        (MASK, [(0, 3), (), (0, 1, 2, 3)]),
        (MASK.tolist(), [(0, 3), (), (0, 1, 2, 3)]),
        (MASK.numpy(), [(0, 3), (), (0, 1, 2, 3)]),
    ],
    ids=str,
)
def test_chosen(asked, expected):
    assert chosen(asked, [4, 4, 4]) == expected


def test_layers_of_different_sizes():
    assert chosen(0.5, [4, 8]) == [(0, 1), (0, 1, 2, 3)]
    assert chosen([[True, False], [False, True, True]], [2, 3]) == [(0,), (1, 2)]


def test_auto():
    """As many of each layer as there is room for, all of a layer that has fewer."""
    assert chosen("auto", [4, 8], lambda: 6) == [tuple(range(4)), tuple(range(6))]
    assert chosen("auto", [4, 8], lambda: 0) == [(), ()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [*((name, name) for name in ("all", "auto", "stream", "stream:9")), ("8", 8), ("0.5", 0.5), ("1", 1), ("1.0", 1.0)],
)
def test_read(text, expected):
    assert read(text) == expected and type(read(text)) is type(expected)


@pytest.mark.parametrize("text", ["", "half", "8 of 128", "All"])
def test_not_read(text):
    with pytest.raises(ArgumentError, match="gpu_experts: expected all, auto, stream, a number"):
        read(text)


WRONG = ["auto", "half", -1, 5, 0.0, 1.5, True, float("nan"), MASK[:2], MASK[:, :3], MASK.int(), [], [1, 2], object()]


@pytest.mark.parametrize("asked", WRONG)
def test_refused(asked):
    with pytest.raises(ArgumentError, match=r'expected "all", "auto", "stream", a number of each layer\'s 4 experts'):
        chosen(asked, [4, 4, 4])


def test_streamed():
    assert [streamed(asked) for asked in (None, "all", 3, 0.5, MASK)] == [None] * 5
    assert [streamed(asked).from_tokens for asked in ("stream", "stream:0", "stream:256")] == [None, 0, 256]
    for wrong in ("stream:", "stream:-1", "stream:many", "stream:1:2"):
        with pytest.raises(ArgumentError, match='expected "stream", or "stream:256" for 256 tokens or more'):
            streamed(wrong)
    with pytest.raises(ArgumentError, match="found 'streams'"):
        chosen("streams", [4])
