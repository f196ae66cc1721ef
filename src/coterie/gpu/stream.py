"""Packed streams, docs/format.md, taken apart into codes and scales by torch's operators, on any device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from coterie.checkpoints.codes import MIDDLE, VALUES
from coterie.formats import PANEL_ROWS, Format, Record, round_up
from coterie.gpu.matrices import Matrices

BLOCK_PANELS, LINE, QUAD = 4, 64, (0, 2, 1, 3)
# Of codes of so many bits: how many are lower ones, from which bits of a byte on those of its quads stand, and from
# which the upper ones, in lines of their own.
SPLIT = {
    2: (2, (0, 2, 4, 6), ()),
    3: (2, (0, 4, 2, 6), (0, 4, 1, 5, 2, 6, 3, 7)),
    5: (4, (0, 4), (0, 1, 2, 3, 4, 5, 6, 7)),
    6: (4, (0, 4), (0, 2, 4, 6)),
}


def unpacked(spec: Format, rows: int, cols: int, data: Tensor) -> Matrices:
    """The matrices whose streams are the rows of `data`, uint8 [n, bytes]."""
    encoding = spec.encoding
    step = spec.group_size or LINE
    steps, lines = round_up(cols, max(LINE, step)) // step, step * encoding.bits // 32
    single = spec.group_size and encoding.scales is not None and not encoding.record
    width = encoding.scales.itemsize if single else 0  # of a scale in a step
    whole, rest = divmod(round_up(rows, PANEL_ROWS) // PANEL_ROWS, BLOCK_PANELS)
    codes, scale, zero, row_scale = [], [], [], []
    for count, panels in ((whole, BLOCK_PANELS), (1, rest)):
        if not count or not panels:
            continue
        height = panels * PANEL_ROWS
        size = lines * panels * LINE
        if width:
            size += LINE if encoding.tile_rows > 1 else height * width
            size += height if spec.zero_point else 0
        size += height * encoding.record.nbytes if encoding.record else 0
        ends = height * ((4 if spec.row_scales else 0) + (1 if spec.zero_point and not width else 0))
        blocks, data = _take(data, count * (steps * size + ends))
        blocks, end = _take(blocks.unflatten(1, (count, -1)), steps * size)

        body = blocks.unflatten(2, (steps, size))
        if encoding.record:
            found, body = _take(body, height * encoding.record.nbytes)
            scale.append(_records(encoding.record, found.unflatten(3, (panels, -1))).transpose(2, 3).flatten(1, 2))
        body, tail = _take(body, lines * panels * LINE)
        words = body.unflatten(3, (lines, panels, PANEL_ROWS, 4)).permute(0, 1, 4, 5, 2, 3, 6)
        codes.append(_in_order(encoding.bits, words.flatten(1, 3)).flatten(2))
        if encoding.tile_rows > 1:
            scale.append(tail[..., :width])
        elif width:
            found, tail = _take(tail, height * width)
            scale.append(found.unflatten(3, (height, -1)).transpose(2, 3).flatten(1, 2))
            if spec.zero_point:
                zero.append(tail.transpose(2, 3).flatten(1, 2))
        if spec.row_scales:
            found, end = _take(end, height * 4)
            row_scale.append(found.unflatten(2, (height, 4)).flatten(1, 2))
        if spec.zero_point and not width:
            zero.append(end.flatten(1, 2)[..., None])

    def joined(parts: list[Tensor], dtype: torch.dtype = torch.uint8) -> Tensor | None:
        return torch.cat(parts, 1).contiguous().view(dtype) if parts else None

    groups = -(-cols // spec.group_size) if spec.group_size else 1
    stored = {4: -(-cols // 2), 16: 2 * cols}.get(encoding.bits, cols)
    found = torch.cat(codes, 1)[:, :rows, :stored].contiguous()
    scales, zeros = joined(scale, encoding.scales or torch.uint8), joined(zero)
    row_scales = joined(row_scale, torch.float32)
    if scales is not None:
        own = slice(0, None, 2) if encoding.tile_rows > 1 else slice(0, rows)  # two blocks of 64 rows are of one tile
        scales = scales[:, own, :groups].contiguous()
        scales = scales if encoding.record else scales[..., 0]
    return Matrices(
        spec,
        cols,
        found.view(torch.bfloat16) if encoding.bits == 16 else found,
        scales,
        None if zeros is None else zeros[:, :rows, :groups].contiguous(),
        None if row_scales is None else row_scales[:, :rows, 0].contiguous(),
        _pairs(spec, data.device) if encoding.bits == 4 else None,
    )


def _take(stream: Tensor, nbytes: int) -> tuple[Tensor, Tensor]:
    """The first bytes of streams [..., bytes], and the others."""
    return stream[..., :nbytes], stream[..., nbytes:]


def _records(record: Record, panels: Tensor) -> Tensor:
    """The records of rows [..., rows, bytes] of the bytes of panels [..., panels, 16 * bytes]: numbers, each of all
    rows of a panel side by side, then bytes likewise."""
    numbers, single = _take(panels, 2 * record.numbers * PANEL_ROWS)
    of_rows = (
        numbers.unflatten(-1, (-1, PANEL_ROWS, 2)).transpose(-3, -2).flatten(-2),
        single.unflatten(-1, (-1, PANEL_ROWS)).transpose(-2, -1),
    )
    return torch.cat(of_rows, -1).flatten(-3, -2)


def _in_order(bits: int, words: Tensor) -> Tensor:
    """The four bytes of each word [..., lines, 4] in the order of columns; of 4-bit codes with two neighbours to a
    byte, others of fewer than 8 bits one to a byte."""
    if bits == 16:
        return words
    a, b, c, d = (words[..., i] for i in QUAD)
    if bits == 8 or bits in SPLIT:
        quads = torch.stack([a, b, c, d], -1)
        return quads if bits == 8 else _joined(bits, quads)
    low = [(even & 15) | (odd & 15) << 4 for even, odd in ((a, b), (c, d))]
    high = [(even >> 4) | (odd & 240) for even, odd in ((a, b), (c, d))]
    return torch.stack(low + high, -1)


def _joined(bits: int, quads: Tensor) -> Tensor:
    """Codes whose upper bits, if `SPLIT` says that there are such, stand in a line before those of the lower ones."""
    low, of_lower, of_upper = SPLIT[bits]
    high = bits - low
    runs = quads.unflatten(-2, (-1, bits // high if high else 1))
    lines = runs[..., 1:, :] if high else runs
    lower = torch.stack([lines >> bit & (1 << low) - 1 for bit in of_lower], -2).flatten(-3)
    if not high:
        return lower
    upper = [runs[..., 0, :] >> bit & (1 << high) - 1 for bit in of_upper]
    return lower | torch.stack(upper, -2).flatten(-2) << low


@functools.cache
@torch.inference_mode(False)
def _pairs(spec: Format, device: torch.device) -> Tensor:
    """For each byte the values of its two codes, as the bits of an int32. To copy it would wait for the device."""
    if spec.name in VALUES:
        values = torch.tensor(VALUES[spec.name])
    else:
        values = torch.arange(16) - (0 if spec.zero_point else MIDDLE[spec.name])
    values = values.to(torch.bfloat16)
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], -1).view(torch.int32)[:, 0].to(device)
