"""Packed matrices of some experts written out as bfloat16, in one pass."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from coterie.gpu.kernels.decode import (
    as_bytes,
    kind_of_codes,
    kind_of_scales,
    middle_of,
    number,
    rounded,
    table_of,
    value,
)
from coterie.gpu.matrices import Matrices

ROWS, COLUMNS = 16, 256  # of a program


@triton.jit
def _dequantise(
    out, codes, scale, row_scale, zero, minimum, table, index,
    rows, cols, width, groups, scale_rows, out_expert, out_row,
    BITS: tl.constexpr, KIND: tl.constexpr, MIDDLE: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr,
    TILE: tl.constexpr, BY_POSITION: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ROW: tl.constexpr,
    PER_ROW: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_MINIMUM: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """R rows, N groups of one expert; `width`: bytes, or bf16 values, of a row's codes."""
    position = tl.program_id(2).to(tl.int64)
    expert = tl.load(index + position).to(tl.int64)
    owner = position if BY_POSITION else expert
    row = (tl.program_id(0) * R + tl.arange(0, R))[:, None, None]
    group = (tl.program_id(1) * N + tl.arange(0, N))[None, :, None]
    STORED: tl.constexpr = GROUP // 2 if BITS == 4 else GROUP
    column = group * STORED + tl.arange(0, STORED)[None, None, :]
    code = tl.load(codes + expert * rows * width + row * width + column, mask=(row < rows) & (column < width), other=0)
    there = (row < rows) & (group < groups)
    factor = tl.full([R, N, 1], 1.0, tl.float32)
    if HAS_SCALE:
        where = owner * scale_rows * groups + (row // TILE) * groups + group
        factor = number(tl.load(scale + where, mask=there, other=0), SCALE)
    if HAS_ROW:
        factor = factor * tl.load(row_scale + expert * rows + row, mask=row < rows, other=0)
    less = tl.zeros([R, N, 1], tl.float32)
    if HAS_ZERO:
        where = expert * rows + row if PER_ROW else (expert * rows + row) * groups + group
        less = tl.load(zero + where, mask=there, other=0).to(tl.float32)
    if BITS == 4:
        code = code.to(tl.int32)
        low = (value(code & 15, table, KIND, MIDDLE) - less) * factor
        high = (value(code >> 4, table, KIND, MIDDLE) - less) * factor
        weight = tl.interleave(low, high)
    else:
        weight = (value(code.to(tl.int32), table, KIND, MIDDLE) - less) * factor
    if HAS_MINIMUM:
        weight = weight - tl.load(minimum + owner * rows * groups + row * groups + group, mask=there, other=0)
    column = group * GROUP + tl.arange(0, GROUP)[None, None, :]
    to = out + position * out_expert + row.to(tl.int64) * out_row + column
    tl.store(to, rounded(weight), mask=(row < rows) & (column < cols))


def dequantise(matrices: Matrices, index: Tensor, out: Tensor) -> None:
    """As `Matrices.dense` does, to the bit: the weights of experts `index` [m] to bfloat16 `out` [m, rows, cols]."""
    spec, (rows, width) = matrices.spec, matrices.codes.shape[1:]
    if spec.encoding.bits == 16:
        out.copy_(matrices.codes.index_select(0, index))
        return
    scale, minimum, by_position = matrices.scale, None, spec.encoding.record is not None
    if by_position:
        scale, minimum = matrices.scales_of(index)
    group = spec.scale_columns or 64
    groups = triton.cdiv(matrices.cols, group) if not spec.scale_columns or scale is None else scale.shape[2]
    per_program = max(1, COLUMNS // group)
    scale_rows = rows if scale is None else scale.shape[1]
    grid = (triton.cdiv(rows, ROWS), triton.cdiv(groups, per_program), len(index))
    _dequantise[grid](
        out, as_bytes(matrices.codes), as_bytes(scale), matrices.row_scale, matrices.zero, minimum,
        table_of(spec, out.device), index, rows, matrices.cols, width, groups, scale_rows, *out.stride()[:2],
        BITS=4 if spec.encoding.bits == 4 else 8, KIND=kind_of_codes(spec), MIDDLE=middle_of(spec),
        SCALE=0 if scale is None else kind_of_scales(scale), GROUP=group, TILE=spec.encoding.tile_rows,
        BY_POSITION=by_position, HAS_SCALE=scale is not None, HAS_ROW=matrices.row_scale is not None,
        PER_ROW=not spec.scale_columns, HAS_ZERO=matrices.zero is not None, HAS_MINIMUM=minimum is not None,
        R=ROWS, N=per_program, enable_fp_fusion=False,
    )  # fmt: skip
