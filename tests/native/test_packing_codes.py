"""Weights that are quantised already are packed as they are: not a bit of a code or a scale changes."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, matrix_shapes, name_of, options
from streams import floats, matrix_of, random_records, take_apart

from coterie import Experts
from coterie.errors import ArgumentError
from coterie.formats import Format


def empty(spec, rows, cols):
    return Experts.empty(1, cols, rows, **options(spec), has_gate=False)


def source_of(spec, rows, cols, seed=0):
    """Random codes, scales and zero points in the dtypes in which checkpoints have them."""
    random = torch.Generator().manual_seed(seed)
    encoding, groups = spec.encoding, -(-cols // spec.group_size) if spec.group_size else 0
    given = {}
    if encoding.bits == 16:
        given["codes"] = torch.randn(rows, cols, generator=random).bfloat16()
    else:
        codes = torch.randint(0, 2**encoding.bits, (rows, cols), generator=random, dtype=torch.uint8)
        if encoding.codes == torch.float8_e4m3fn:
            codes = torch.where(codes & 0x7F == 0x7F, 0, codes)
        given["codes"] = codes.clamp(min=1 if spec.name in ("int8", "q8_0") else 0).view(encoding.codes)
    if groups and encoding.scales is not None:
        shape = (-(-rows // encoding.tile_rows), groups)
        if encoding.record:
            given["scale"] = random_records(spec, rows, groups, random)
        elif encoding.scales == torch.uint8:
            given["scale"] = torch.randint(100, 140, shape, generator=random, dtype=torch.uint8)
        else:
            given["scale"] = (torch.rand(shape, generator=random) + 0.1).to(encoding.scales)
    if spec.zero_point:
        shape = (rows, groups) if groups else (rows,)
        given["zero"] = torch.randint(0, 16, shape, generator=random, dtype=torch.uint8)
    if spec.row_scales:
        given["row_scale"] = torch.rand(rows, generator=random) + 0.1
    return given


def shapes(spec):
    """Of several blocks and of one, and with columns beyond the last whole step, where there may be such."""
    free = not spec.group_size or spec.encoding.pads
    return [*matrix_shapes(spec), *([(70, 328), (17, 40)] if free else [])]


@pytest.mark.parametrize(
    ("spec", "rows", "cols"),
    [pytest.param(spec, *shape, id=f"{name_of(spec)}-{shape}") for spec in FORMATS for shape in shapes(spec)],
)
def test_codes_come_back(spec, rows, cols):
    given = source_of(spec, rows, cols)
    experts = empty(spec, rows, cols)
    experts.pack_codes("up", 0, **given)
    parts = take_apart(spec, rows, cols, matrix_of(experts, "up", 0))
    assert torch.equal(parts.codes, given["codes"].view(torch.int16 if spec.name == "bf16" else torch.uint8))
    scale = given.get("scale")
    if scale is not None and spec.encoding.record:
        assert torch.equal(parts.scale[:, : scale.shape[1]], scale)
        assert not parts.scale[:, scale.shape[1] :].any()
    elif scale is not None:
        scale = scale.repeat_interleave(spec.encoding.tile_rows, 0)[:rows]
        expected = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
        assert torch.equal(floats(spec, parts), expected)
    for name, found in (("zero", parts.zero), ("row_scale", parts.row_scale)):
        assert (found is None) == (name not in given)
        assert found is None or torch.equal(found, given[name])


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_codes_of_packed_floats_make_the_same_bytes(spec):
    rows, cols = matrix_shapes(spec)[1]
    packed, again = empty(spec, rows, cols), empty(spec, rows, cols)
    packed.pack_projection("up", 0, torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)))
    parts = take_apart(spec, rows, cols, matrix_of(packed, "up", 0))
    encoding, given = spec.encoding, {"codes": parts.codes.contiguous().view(spec.encoding.codes)}
    if parts.scale is not None:
        scale = parts.scale[:: encoding.tile_rows].contiguous().view(encoding.scales)
        given["scale"] = scale if encoding.record else scale.squeeze(-1)
    given |= {"zero": parts.zero} if parts.zero is not None else {}
    given |= {"row_scale": parts.row_scale} if parts.row_scale is not None else {}
    again.pack_codes("up", 0, **given)
    assert torch.equal(again.dequantize_projection("up", 0), packed.dequantize_projection("up", 0))
    assert torch.equal(take_apart(spec, rows, cols, matrix_of(again, "up", 0)).codes, parts.codes)


def test_one_scale_for_the_matrix():
    spec = Format("nvfp4", 16)
    one, each = empty(spec, 80, 64), empty(spec, 80, 64)
    given = source_of(spec, 80, 64)
    one.pack_codes("up", 0, given["codes"], given["scale"], row_scale=0.25)
    each.pack_codes("up", 0, given["codes"], given["scale"], row_scale=torch.full((80,), 0.25))
    assert torch.equal(one.packed(0), each.packed(0))


@pytest.mark.parametrize(
    ("spec", "change", "message"),
    [
        (Format("mxfp4", 32), {"scale": None}, "scale: mxfp4 has torch.uint8, found none"),
        (Format("mxfp4", 32), {"zero": torch.zeros(96, 8, dtype=torch.uint8)}, "zero: mxfp4 has none, found"),
        (Format("mxfp4", 32), {"scale": torch.ones(96, 8)}, "scale: found torch.float32"),
        (Format("mxfp4", 32), {"scale": torch.ones(96, 7, dtype=torch.uint8)}, r"scale: expected shape \[96, 8\]"),
        (Format("mxfp4", 32), {"scale": torch.full((96, 8), 255, dtype=torch.uint8)}, "NaN, or out of mxfp4's range"),
        (Format("mxfp4", 32), {"codes": torch.full((96, 256), 16, dtype=torch.uint8)}, "out of mxfp4's range"),
        (Format("int8"), {"codes": torch.zeros(96, 256, dtype=torch.uint8)}, "out of int8's range"),
        (Format("q8_0", 32), {"codes": torch.zeros(96, 256, dtype=torch.uint8)}, "out of q8_0's range"),
        (Format("q4_0", 32), {"scale": torch.full((96, 8), torch.inf, dtype=torch.float16)}, "out of q4_0's range"),
        (Format("iq4_nl", 32), {"codes": torch.full((96, 256), 16, dtype=torch.uint8)}, "out of iq4_nl's range"),
        (Format("q4_k", 256), {"scale": torch.zeros(96, 1, dtype=torch.uint8)}, r"scale: expected shape \[96, 1, 16\]"),
        (Format("q4_k", 256), {"scale": torch.full((96, 1, 16), 127, dtype=torch.uint8)}, "out of q4_k's range"),
        (Format("q6_k", 256), {"scale": torch.full((96, 1, 18), 255, dtype=torch.uint8)}, "out of q6_k's range"),
        (Format("q6_k", 256), {"codes": torch.full((96, 256), 64, dtype=torch.uint8)}, "out of q6_k's range"),
        (Format("q3_k", 256), {"codes": torch.full((96, 256), 8, dtype=torch.uint8)}, "out of q3_k's range"),
        (Format("fp8_channel"), {"codes": torch.full((96, 256), torch.nan).to(torch.float8_e4m3fn)}, "is NaN"),
        (Format("fp8_block", 128), {"scale": torch.ones(2, 2)}, r"scale: expected shape \[1, 2\]"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(spec, change, message):
    with pytest.raises(ArgumentError, match=message):
        empty(spec, 96, 256).pack_codes("up", 0, **{**source_of(spec, 96, 256), **change})
