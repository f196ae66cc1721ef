"""Gram products of a few columns and of tokens that are gathered on the way: the gradients of LoRA's A."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.gpu.kernels.decode import INTERPRETED, rounded

ROWS, COLUMNS = 32, 128  # of a step and of a program


@triton.jit
def _gathered_gram(
    out, a, tokens, index, ends, rank, a_stride, stride, cols,
    R: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """C columns of one expert: its rows end before ends[expert]."""
    expert = tl.program_id(0)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    column = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    low = tl.arange(0, R)[None, :]
    sums = tl.zeros([C, R], tl.float32)
    for first in range(start, end, M):
        row = first + tl.arange(0, M)
        token = tl.load(index + row, mask=row < end, other=0)[:, None]
        row = row[:, None]
        x = tl.load(tokens + token * stride + column, mask=(row < end) & (column < cols), other=0)
        factor = tl.load(a + row.to(tl.int64) * a_stride + low, mask=(row < end) & (low < rank), other=0)
        if INTERPRETED:  # whose products of bfloat16 are wrong
            sums = tl.dot(tl.trans(x.to(tl.float32)), factor.to(tl.float32), sums)
        else:
            sums = tl.dot(tl.trans(x), factor, sums)
    column = tl.program_id(1) * C + tl.arange(0, C)[:, None]
    to = out + expert.to(tl.int64) * rank * cols + low * cols + column
    tl.store(to, rounded(sums), mask=(low < rank) & (column < cols))


def gathered_gram(a: Tensor, tokens: Tensor, index: Tensor, ends: Tensor, cols: int) -> Tensor:
    """See `gpu.products.gathered_gram`."""
    rank = a.shape[1]
    out = torch.empty(len(ends), rank, cols, dtype=torch.bfloat16, device=a.device)
    _gathered_gram[(len(ends), triton.cdiv(cols, COLUMNS))](
        out, a, tokens, index, ends, rank, a.stride(0), tokens.stride(0), cols,
        R=max(16, triton.next_power_of_2(rank)), M=ROWS, C=COLUMNS,
    )  # fmt: skip
    return out
