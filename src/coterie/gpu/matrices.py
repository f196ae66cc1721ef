"""Packed matrices of several experts in plain tensors, on any device: codes and scales, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.checkpoints.codes import MIDDLE, number
from coterie.checkpoints.records import scales_of
from coterie.formats import Format


@dataclass(frozen=True, slots=True)
class Matrices:
    """Matrices [rows, cols] of n experts in format `spec`.

    codes: bfloat16 or uint8 [n, rows, cols], one to a byte; of 4 bits [n, rows, cols / 2], the
        even column in a byte's low half.
    scale: in the encoding's dtype, [n, rows, groups], or of tiles [n, rows / tile_rows, groups], rounded up, or records
        [n, rows, groups, bytes].
    zero: uint8 [n, rows, groups]. row_scale: float32 [n, rows]. None: the format has no such part.
    pairs: what a byte of two 4-bit codes stands for, two bfloat16 in an int32, [256].
    """

    spec: Format
    cols: int
    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    row_scale: Tensor | None
    pairs: Tensor | None

    @property
    def nbytes(self) -> int:
        parts = (self.codes, self.scale, self.zero, self.row_scale)
        return sum(part.nbytes for part in parts if part is not None)

    def dense(self, index: Tensor, out: Tensor) -> None:
        """Writes the weights of experts `index` [m] to `out`, bfloat16 or float32 [m, rows, cols].

        As the CPU's kernels have them: the scales' product, rounded to float32, times the code's value, rounded once.
        """
        values, (scale, minimum) = self._values(index), self.scales_of(index)
        if scale is None:
            out.copy_(values)
            return
        width = self.spec.scale_columns or self.cols
        whole = self.cols // width
        end = whole * width
        if minimum is not None:
            columns = [part.repeat_interleave(width, -1)[..., : self.cols] for part in (scale, minimum)]
            torch.sub(values * columns[0], columns[1], out=out)
            return
        zero = None if self.zero is None else self.zero.index_select(0, index)
        if whole:
            grouped = values[..., :end].unflatten(-1, (whole, width))
            if zero is not None:
                grouped.sub_(zero[..., None])
            torch.mul(grouped, scale[..., :whole, None], out=out[..., :end].unflatten(-1, (whole, width)))
        if end < self.cols:  # the last tile is narrow
            torch.mul(values[..., end:], scale[..., whole : whole + 1], out=out[..., end:])

    def parts(self, i: int) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Codes, scale, zero and row_scale of expert i in RAM, as `Experts.pack_codes` takes them."""
        encoding, codes = self.spec.encoding, self.codes[i].to("cpu")
        if encoding.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[:, : self.cols].contiguous()
        scale, zero, row_scale = (
            None if part is None else part[i].to("cpu") for part in (self.scale, self.zero, self.row_scale)
        )
        if zero is not None and not self.spec.group_size:
            zero = zero[:, 0]
        return codes.view(encoding.codes), scale, zero, row_scale

    def _values(self, index: Tensor) -> Tensor:
        """What the codes stand for before zero points are taken off: bfloat16, which holds each of them exactly."""
        codes = self.codes.index_select(0, index)
        if self.pairs is not None:
            pairs = self.pairs.index_select(0, codes.flatten().int()).view(codes.shape)
            return pairs.view(torch.bfloat16)[..., : self.cols]
        if self.spec.encoding.codes == torch.float8_e4m3fn:
            return codes.view(torch.float8_e4m3fn).to(torch.bfloat16)
        return codes if self.spec.encoding.bits == 16 else codes.to(torch.bfloat16).sub_(MIDDLE[self.spec.name])

    def scales_of(self, index: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scales of experts `index` and what is taken off, float32 [m, rows, groups], where there are such.

        One group where only rows have a scale.
        """
        rows = None if self.row_scale is None else self.row_scale.index_select(0, index)[..., None]
        if self.scale is None:
            return rows, None
        if self.spec.encoding.record:
            return scales_of(self.spec, self.scale.index_select(0, index))
        stored, tile = self.scale.dtype, self.spec.encoding.tile_rows
        scale = number(self.scale.view(torch.uint8).index_select(0, index).view(stored))
        if tile > 1:
            scale = scale.repeat_interleave(tile, 1)[:, : self.codes.shape[1]]
        return scale if rows is None else scale * rows, None
