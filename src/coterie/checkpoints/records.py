"""Records of scales: the bytes in which a group of columns has several, and the numbers they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from coterie.formats import (
    OF_BYTES,
    OF_NIBBLES,
    OF_SIX_BITS,
    SIXTEEN_OF_SIX_BITS,
    WITH_MINIMA,
    WITH_START,
    Format,
)


def _f16(record: Tensor, at: int) -> Tensor:
    """Float32 [..., 1]: the number at a byte of each record."""
    return record[..., at : at + 2].contiguous().view(torch.float16).float()


def _with_minima(record: Tensor) -> tuple[Tensor, Tensor]:
    """Two f16, and eight times two whole numbers of 6 bits: those of scales 0 to 3, of minima 0 to 3, and the lower
    four bits of scales and of minima 4 to 7, whose upper two lie above the others."""
    first, second, lower = record[..., 4:8], record[..., 8:12], record[..., 12:16]
    of_scale = torch.cat([first & 63, lower & 15 | first >> 6 << 4], -1)
    of_minimum = torch.cat([second & 63, lower >> 4 | second >> 6 << 4], -1)
    return _f16(record, 0) * of_scale, _f16(record, 2) * of_minimum


def _signed_bytes(record: Tensor) -> tuple[Tensor, None]:
    """An f16, and sixteen signed bytes."""
    return _f16(record, 0) * record[..., 2:18].contiguous().view(torch.int8), None


def _six_bits(record: Tensor) -> tuple[Tensor, None]:
    """An f16, and eight whole numbers of 6 bits, less 32: the upper two bits of four to a byte, then the lower four of
    two to a byte."""
    upper = torch.stack([record[..., 2 + n // 4] >> 2 * (n % 4) & 3 for n in range(8)], -1)
    lower = torch.stack([record[..., 4 + n // 2] >> 4 * (n % 2) & 15 for n in range(8)], -1)
    return _f16(record, 0) * ((lower | upper << 4).float() - 32), None


def _sixteen_of_six_bits(record: Tensor) -> tuple[Tensor, None]:
    """An f16, and sixteen such numbers: the lower four bits of n and, above them, of n + 8, then the upper two of n,
    n + 4, n + 8 and n + 12."""
    lower = torch.cat([record[..., 2:10] & 15, record[..., 2:10] >> 4], -1)
    upper = torch.cat([record[..., 10:14] >> 2 * n & 3 for n in range(4)], -1)
    return _f16(record, 0) * ((lower | upper << 4).float() - 32), None


def _nibbles(record: Tensor) -> tuple[Tensor, Tensor]:
    """Two f16, and sixteen bytes with a number of 4 bits for a scale and, above it, one for a minimum."""
    return _f16(record, 0) * (record[..., 4:] & 15), _f16(record, 2) * (record[..., 4:] >> 4)


def _with_start(record: Tensor) -> tuple[Tensor, Tensor]:
    """Two f16, the second of which is added."""
    return _f16(record, 0), -_f16(record, 2)


READ = {
    WITH_MINIMA: _with_minima,
    OF_SIX_BITS: _six_bits,
    SIXTEEN_OF_SIX_BITS: _sixteen_of_six_bits,
    OF_BYTES: _signed_bytes,
    OF_NIBBLES: _nibbles,
    WITH_START: _with_start,
}


def scales_of(spec: Format, record: Tensor) -> tuple[Tensor, Tensor | None]:
    """(scales, what is taken off, or None), float32 [..., groups * parts], of records uint8 [..., groups, bytes]."""
    scale, minimum = READ[spec.encoding.record](record)
    return scale.flatten(-2), None if minimum is None else minimum.flatten(-2)
