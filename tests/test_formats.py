"""Formats by name, and the bytes they take."""

from __future__ import annotations

import pytest
from engine_cases import FORMATS, name_of, options

from coterie import Experts
from coterie.errors import ArgumentError
from coterie.formats import Format, resolve


def test_defaults():
    assert resolve("bf16") == Format("bf16", 0, False)
    assert resolve("int8") == Format("int8", 0, False)
    assert resolve("int4") == Format("int4", 32, False)
    assert resolve("int4", 0, True) == Format("int4", 0, True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("int5",), "unknown format 'int5': expected one of bf16, int8, int4"),
        (("INT4",), "unknown format 'INT4'"),
        (("bf16", 32), "bf16 has no scales"),
        (("int4", 33), r"group_size: expected 0 \(per row\) or one of \(32, 64, 128\), found 33"),
        (("int8", -32), "group_size: .* found -32"),
        (("int8", None, True), "zero_point is an option of int4, found with int8"),
        (("bf16", None, True), "zero_point is an option of int4, found with bf16"),
    ],
)
def test_what_does_not_exist_is_refused(given, message):
    with pytest.raises(ArgumentError, match=message):
        resolve(*given)


def test_bytes_of_a_matrix():
    assert Format("bf16").matrix_nbytes(16, 64) == {"weight": 2048}
    assert Format("bf16").matrix_nbytes(1, 1) == {"weight": 2048}
    assert Format("int8").matrix_nbytes(17, 65) == {"weight": 32 * 128, "scale": 32 * 4}
    assert Format("int8", 64).matrix_nbytes(16, 192) == {"weight": 16 * 192, "scale": 16 * 3 * 2}
    assert Format("int4", 32).matrix_nbytes(16, 96) == {"weight": 16 * 64, "scale": 16 * 4 * 2}
    assert Format("int4", 32, True).matrix_nbytes(16, 64) == {"weight": 512, "scale": 64, "zero": 32}
    assert Format("int4", 0, True).matrix_nbytes(16, 64) == {"weight": 512, "scale": 64, "zero": 16}


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_experts_take_these_bytes(spec):
    experts = Experts.empty(2, 128, 256, **options(spec))
    parts = list(experts.parts())
    up, down = spec.matrix_nbytes(256, 128), spec.matrix_nbytes(128, 256)
    assert [(name, e, part) for name, e, part, _ in parts] == [
        (name, e, part) for name in ("gate", "up", "down") for e in range(2) for part in up
    ]
    assert experts.nbytes == sum(data.numel() for *_, data in parts) == 2 * (2 * sum(up.values()) + sum(down.values()))


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_group_that_does_not_divide_the_columns(group_size):
    with pytest.raises(ArgumentError, match=f"up: 48 columns are not a multiple of group_size={group_size}"):
        Experts.empty(1, 48, 128, format="int4", group_size=group_size, has_gate=False)
    with pytest.raises(ArgumentError, match=f"down: 48 columns are not a multiple of group_size={group_size}"):
        Experts.empty(1, 128, 48, format="int8", group_size=group_size)
