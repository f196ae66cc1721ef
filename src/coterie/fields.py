"""Codes of a few bits that share bytes, in the orders in which files have them, made a byte each."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import _native
from .errors import ArgumentError


class Field(NamedTuple):
    """Numbers of `bits` bits from byte `at` of a block on, all that a byte holds of them: the lowest bits of `span`
    bytes are the first `span` numbers, the next bits of those bytes the next."""

    at: int
    bits: int
    span: int


NONE = Field(0, 0, 0)


def spread(blocks: np.ndarray, count: int, lower: Field, upper: Field = NONE, flip: int = 0) -> Tensor:
    """Codes, uint8 [rows, blocks * count], of blocks with `count` each, uint8 [rows, blocks, bytes], back to back.

    Codes are numbers of `lower` exclusive-or `flip`, and above them those of `upper`.
    """
    rows, number, nbytes = blocks.shape
    if blocks.dtype != np.uint8 or not blocks.flags.c_contiguous:
        raise ArgumentError(f"blocks: expected adjacent bytes, found {blocks.dtype} with strides {blocks.strides}")
    if any(field.at + count * field.bits // 8 > nbytes for field in (lower, upper)):
        raise ArgumentError(f"blocks of {nbytes} bytes: expected room for {count} numbers of {lower}, {upper}")
    codes = torch.empty(rows, number * count, dtype=torch.uint8, device="cpu")
    _native.spread_fields(blocks.ctypes.data, rows * number, nbytes, count, lower, upper, flip, codes.data_ptr())
    return codes
