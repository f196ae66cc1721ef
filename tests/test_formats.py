"""Formats by name, and the bytes they take."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, matrix_shapes, name_of, options
from streams import floats, matrix_of, minima, take_apart

from coterie import Experts
from coterie.errors import ArgumentError
from coterie.formats import Format, resolve, round_up
from coterie.reference import E2M1, IQ4


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
        (("bf16", 32), "bf16 has no groups: expected group_size 0 or None, found 32"),
        (("int4", 33), r"group_size of int4: expected 0 \(per row\), 32, 64, 128, found 33"),
        (("int8", -32), "group_size of int8: .* found -32"),
        (("mxfp4", 0), "group_size of mxfp4: expected 32, found 0"),
        (("int8", None, True), "zero_point is an option of int4, found with int8"),
        (("bf16", None, True), "zero_point is an option of int4, found with bf16"),
    ],
)
def test_what_does_not_exist_is_refused(given, message):
    with pytest.raises(ArgumentError, match=message):
        resolve(*given)


def test_bytes_of_a_matrix():
    assert Format("bf16").matrix_nbytes(16, 64) == 2048
    assert Format("bf16").matrix_nbytes(1, 1) == 2048
    assert Format("int8").matrix_nbytes(17, 65) == 32 * 128 + 32 * 4
    assert Format("int8", 64).matrix_nbytes(16, 192) == 16 * 192 + 16 * 3 * 2 + 32  # up to a whole line
    assert Format("int4", 32).matrix_nbytes(64, 96) == 64 * 64 + 64 * 4 * 2
    assert Format("int4", 32, True).matrix_nbytes(64, 64) == 2048 + 256 + 128
    assert Format("int4", 0, True).matrix_nbytes(64, 64) == 2048 + 256 + 64
    assert Format("fp8_block", 128).matrix_nbytes(65, 129) == (64 + 16) * 256 + 2 * 2 * 64
    assert Format("q4_k", 256).matrix_nbytes(64, 512) == 64 * 512 * 9 // 16
    assert Format("q5_k", 256).matrix_nbytes(64, 256) == 64 * 256 * 11 // 16
    assert Format("q4_1", 32).matrix_nbytes(64, 64) == 64 * 64 * 5 // 8
    assert Format("q5_0", 32).matrix_nbytes(64, 64) == 64 * 64 * 11 // 16
    assert Format("q5_1", 32).matrix_nbytes(64, 64) == 64 * 64 * 3 // 4
    assert Format("q2_k", 256).matrix_nbytes(64, 256) == 64 * 256 * 21 // 64
    assert Format("q3_k", 256).matrix_nbytes(64, 256) == 64 * 110
    assert Format("iq4_xs", 256).matrix_nbytes(64, 256) == 64 * 256 * 17 // 32
    assert Format("q6_k", 256).matrix_nbytes(17, 257) == 32 * 512 * 105 // 128
    assert Format("nvfp4", 16).matrix_nbytes(64, 64) == 2048 + 64 * 4 + 64 * 4


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_experts_take_these_bytes(spec):
    experts = Experts.empty(2, 128, 256, **options(spec))
    up, down = spec.matrix_nbytes(256, 128), spec.matrix_nbytes(128, 256)
    assert experts.expert_nbytes == round_up(2 * up + down, 4096) == experts.packed(1).numel()
    assert experts.nbytes == 2 * experts.expert_nbytes
    assert experts.packed(1).data_ptr() - experts.packed(0).data_ptr() == experts.expert_nbytes
    assert experts.packed(0).data_ptr() % 4096 == 0


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_the_stream_is_as_documented(spec):
    """What another reader finds in the bytes stands for what the engine says the matrix is."""
    for rows, cols in matrix_shapes(spec):
        experts = Experts.empty(1, cols, rows, **options(spec), has_gate=False)
        experts.pack_projection("up", 0, torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows)))
        parts = take_apart(spec, rows, cols, matrix_of(experts, "up", 0))
        assert torch.equal(value_of(spec, parts), experts.dequantize_projection("up", 0)), (rows, cols)


def value_of(spec, parts):
    if spec.name == "bf16":
        return parts.codes.view(torch.bfloat16).float()
    if spec.encoding.codes == torch.float8_e4m3fn:
        values = parts.codes.view(torch.float8_e4m3fn).float()
    elif spec.name in ("mxfp4", "nvfp4"):
        values = torch.tensor([*E2M1, *(-v for v in E2M1)])[parts.codes.long()]
    elif spec.name in ("iq4_nl", "iq4_xs"):
        values = torch.tensor(IQ4)[parts.codes.long()]
    else:
        zero = {"q4_k": 0, "q6_k": 32, "q5_k": 0, "q4_1": 0, "q5_0": 16, "q5_1": 0, "q2_k": 0, "q3_k": 4}.get(
            spec.name, 128 if spec.encoding.bits == 8 else 8
        )
        if parts.zero is not None:
            zero = parts.zero.float()
            zero = zero.repeat_interleave(spec.group_size, 1) if spec.group_size else zero[:, None]
        values = parts.codes.float() - zero
    scale, row_scale = floats(spec, parts), parts.row_scale
    factor = torch.ones(()) if row_scale is None else row_scale[:, None]
    if scale is not None:
        factor = factor * scale.repeat_interleave(spec.scale_columns, 1)[:, : values.shape[1]]
    off = minima(spec, parts)
    if off is not None:
        return values * factor - off.repeat_interleave(spec.scale_columns, 1)[:, : values.shape[1]]
    return values * factor


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_a_group_that_does_not_divide_the_columns(group_size):
    with pytest.raises(ArgumentError, match=f"up: 48 columns are not a multiple of group_size={group_size}"):
        Experts.empty(1, 48, 128, format="int4", group_size=group_size, has_gate=False)
    with pytest.raises(ArgumentError, match=f"down: 48 columns are not a multiple of group_size={group_size}"):
        Experts.empty(1, 128, 48, format="int8", group_size=group_size)
