"""A matrix that is quantised already, in the parts that `Experts.pack_codes` takes, and the numbers it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.formats import E2M1, Format

SIGNED = (*E2M1, *(-value for value in E2M1))
# The values of 4-bit codes, by format.
VALUES = {"mxfp4": SIGNED, "nvfp4": SIGNED, "int4": tuple(range(-8, 8))}


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantised matrix [rows, cols] of format `spec`.

    codes [rows, cols] in the encoding's own dtype, 4-bit ones one to a byte; scale, in its own dtype, [rows, groups],
    or of tiles [rows / tile_rows, groups], rounded up; row_scale float32 [rows]. None: the format has no such part.
    """

    spec: Format
    codes: Tensor
    scale: Tensor | None
    row_scale: Tensor | None

    def dequantize(self) -> Tensor:
        """Float32 [rows, cols]: the scales' product, rounded, times the code's value, as the kernels have it."""
        rows, cols = self.codes.shape
        if self.spec.name in VALUES:
            dense = torch.tensor(VALUES[self.spec.name], dtype=torch.float32, device="cpu")[self.codes.int()]
        else:
            dense = self.codes.float()
        scale = torch.ones(rows, 1, device="cpu") if self.row_scale is None else self.row_scale[:, None]
        if self.scale is not None:
            scale = scale * _number(self.scale).repeat_interleave(self.spec.encoding.tile_rows, 0)[:rows]
        return dense.mul_(scale.repeat_interleave(self.spec.group_size or cols, 1)[:, :cols])

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same with every part changed, [rows, ...] each; no part of the encoding is shared by rows."""
        parts = (None if part is None else change(part) for part in (self.codes, self.scale, self.row_scale))
        return Codes(self.spec, *parts)

    def rows(self, start: int, stop: int) -> Codes:
        """Rows start to stop; start is a multiple of the encoding's tile_rows."""
        tile = self.spec.encoding.tile_rows
        return Codes(
            self.spec,
            self.codes[start:stop],
            None if self.scale is None else self.scale[start // tile : -(-stop // tile)],
            None if self.row_scale is None else self.row_scale[start:stop],
        )


def _number(scale: Tensor) -> Tensor:
    """Float32 of scales; uint8 ones are powers of two, 2^(byte - 127)."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
