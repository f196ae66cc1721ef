"""Packed matrices of several experts in plain tensors, on any device: codes and scales, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.checkpoints.codes import VALUES, number
from coterie.formats import PANEL_ROWS, Format, round_up

BLOCK_PANELS, LINE, QUAD = 4, 64, (0, 2, 1, 3)  # of the stream, see docs/format.md


@dataclass(frozen=True, slots=True)
class Matrices:
    """Matrices [rows, cols] of n experts in format `spec`.

    codes: bfloat16 or uint8 [n, rows, cols]; of 4 bits [n, rows, cols / 2], the even column in a byte's low half.
    scale: in the encoding's dtype, [n, rows, groups], or of tiles [n, rows / tile_rows, groups], rounded up.
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
        values, scale = self._values(index), self._scales(index)
        if scale is None:
            out.copy_(values)
            return
        width = self.spec.group_size or self.cols
        whole = self.cols // width
        end = whole * width
        zero = None if self.zero is None else self.zero.index_select(0, index)
        if whole:
            grouped = values[..., :end].unflatten(-1, (whole, width))
            if zero is not None:
                grouped.sub_(zero[..., None])
            torch.mul(grouped, scale[..., :whole, None], out=out[..., :end].unflatten(-1, (whole, width)))
        if end < self.cols:  # the last tile is narrow
            torch.mul(values[..., end:], scale[..., whole:], out=out[..., end:])

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
        return codes.to(torch.bfloat16).sub_(128) if self.spec.name == "int8" else codes

    def _scales(self, index: Tensor) -> Tensor | None:
        """Float32 [m, rows, groups]; one group where only rows have a scale."""
        rows = None if self.row_scale is None else self.row_scale.index_select(0, index)[..., None]
        if self.scale is None:
            return rows
        stored, tile = self.scale.dtype, self.spec.encoding.tile_rows
        scale = number(self.scale.view(torch.uint8).index_select(0, index).view(stored))
        if tile > 1:
            scale = scale.repeat_interleave(tile, 1)[:, : self.codes.shape[1]]
        return scale if rows is None else scale * rows


def unpacked(spec: Format, rows: int, cols: int, data: Tensor) -> Matrices:
    """The matrices whose packed streams, docs/format.md, are the rows of `data`: uint8 [n, bytes], on any device."""
    encoding = spec.encoding
    step = spec.group_size or LINE
    steps, lines = round_up(cols, max(LINE, step)) // step, step * encoding.bits // 32
    grouped = bool(spec.group_size) and encoding.scales is not None
    whole, rest = divmod(round_up(rows, PANEL_ROWS) // PANEL_ROWS, BLOCK_PANELS)
    codes, scale, zero, row_scale = [], [], [], []
    for count, panels in ((whole, BLOCK_PANELS), (1, rest)):
        if not count or not panels:
            continue
        height = panels * PANEL_ROWS
        size = lines * panels * LINE
        if grouped:
            size += LINE if encoding.tile_rows > 1 else height * encoding.scales.itemsize
            size += height if spec.zero_point else 0
        ends = height * ((4 if spec.row_scales else 0) + (1 if spec.zero_point and not grouped else 0))
        blocks, data = _take(data, count * (steps * size + ends))
        blocks, end = _take(blocks.unflatten(1, (count, -1)), steps * size)

        body, tail = _take(blocks.unflatten(2, (steps, size)), lines * panels * LINE)
        words = body.unflatten(3, (lines, panels, PANEL_ROWS, 4)).permute(0, 1, 4, 5, 2, 3, 6)
        codes.append(_in_order(encoding.bits, words.flatten(1, 3)).flatten(2))
        if grouped and encoding.tile_rows > 1:
            scale.append(tail[..., :4])
        elif grouped:
            found, tail = _take(tail, height * encoding.scales.itemsize)
            scale.append(found.unflatten(3, (height, -1)).transpose(2, 3).flatten(1, 2))
            if spec.zero_point:
                zero.append(tail.transpose(2, 3).flatten(1, 2))
        if spec.row_scales:
            found, end = _take(end, height * 4)
            row_scale.append(found.unflatten(2, (height, 4)).flatten(1, 2))
        if spec.zero_point and not grouped:
            zero.append(end.flatten(1, 2)[..., None])

    def joined(parts: list[Tensor], dtype: torch.dtype = torch.uint8) -> Tensor | None:
        return torch.cat(parts, 1).contiguous().view(dtype) if parts else None

    groups = -(-cols // spec.group_size) if spec.group_size else 1
    found = torch.cat(codes, 1)[:, :rows, : -(-cols * encoding.bits // 8)].contiguous()
    scales, zeros = joined(scale, encoding.scales or torch.uint8), joined(zero)
    if scales is not None:
        scales = scales[..., 0]
        scales = scales[:, ::2, :groups] if encoding.tile_rows > 1 else scales[:, :rows, :groups]
        scales = scales.contiguous()
    return Matrices(
        spec,
        cols,
        found.view(torch.bfloat16) if encoding.bits == 16 else found,
        scales,
        None if zeros is None else zeros[:, :rows, :groups].contiguous(),
        joined(row_scale, torch.float32)[:, :rows, 0].contiguous() if row_scale else None,
        _pairs(spec).to(data.device) if encoding.bits == 4 else None,
    )


def _take(stream: Tensor, nbytes: int) -> tuple[Tensor, Tensor]:
    """The first bytes of streams [..., bytes], and the others."""
    return stream[..., :nbytes], stream[..., nbytes:]


def _in_order(bits: int, words: Tensor) -> Tensor:
    """The four bytes of each word [..., 4] in the order of columns; of 4-bit codes with two neighbours to a byte."""
    if bits == 16:
        return words
    a, b, c, d = (words[..., i] for i in QUAD)
    if bits == 8:
        return torch.stack([a, b, c, d], -1)
    low = [(even & 15) | (odd & 15) << 4 for even, odd in ((a, b), (c, d))]
    high = [(even >> 4) | (odd & 240) for even, odd in ((a, b), (c, d))]
    return torch.stack(low + high, -1)


def _pairs(spec: Format) -> Tensor:
    """For each byte the values of its two codes, as the bits of an int32."""
    values = torch.arange(16) if spec.zero_point else torch.tensor(VALUES[spec.name])
    values = values.to(torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], -1).view(torch.int32)[:, 0]
