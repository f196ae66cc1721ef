"""Packed matrices taken apart by docs/format.md alone: another reader than the engine's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie import Experts
from coterie.formats import Format, round_up

QUAD = (0, 2, 1, 3)  # byte i of a word is column QUAD[i] of its four


@dataclass
class Parts:
    """Codes [rows, cols]; what is stored with them, by row, padding included; None where there is none."""

    codes: Tensor
    scale: Tensor | None  # bytes [rows, steps, bytes of one]
    zero: Tensor | None  # [rows, steps], or [rows]
    row_scale: Tensor | None  # float32 [rows]


def matrix_of(experts: Experts, name: str, expert: int) -> Tensor:
    """The bytes of one matrix."""
    data, start = experts.packed(expert), 0
    for other in experts.projections:
        size = experts.spec.matrix_nbytes(*experts.shape(other))
        if other == name:
            return data[start : start + size]
        start += size
    raise KeyError(name)


def take_apart(spec: Format, rows: int, cols: int, data: Tensor) -> Parts:
    encoding = spec.encoding
    step = spec.group_size or 64
    padded, per_line = round_up(cols, max(64, step)), 32 // encoding.bits
    step_scale = 0 if not spec.group_size or encoding.scales is None else encoding.scales.itemsize
    blocks, at = [], 0
    for first in range(0, rows, 64):
        panels = min(4, -(-(rows - first) // 16))
        found = Parts([], [], [], None)  # type: ignore[arg-type]
        for _ in range(padded // step):
            lines = data[at : at + step // per_line * panels * 64].view(-1, panels, 16, 4)
            at += lines.numel()
            found.codes.append(_codes(encoding.bits, lines))
            if encoding.tile_rows > 1:
                assert (data[at : at + 64].view(torch.float32) == data[at : at + 4].view(torch.float32)).all()
                found.scale.append(data[at : at + 4].expand(panels * 16, 4))
                at += 64
            elif step_scale:
                found.scale.append(data[at : at + panels * 16 * step_scale].view(-1, step_scale))
                at += panels * 16 * step_scale
            if spec.zero_point and spec.group_size:
                found.zero.append(data[at : at + panels * 16])
                at += panels * 16
        row_scale = None
        if spec.row_scales:
            row_scale = data[at : at + panels * 64].clone().view(torch.float32)
            at += panels * 64
        zero = torch.stack(found.zero, 1) if found.zero else None
        if spec.zero_point and not spec.group_size:
            zero = data[at : at + panels * 16]
            at += panels * 16
        scale = torch.stack(found.scale, 1) if found.scale else None
        blocks.append(Parts(torch.cat(found.codes, 1), scale, zero, row_scale))
    assert round_up(at, 64) == data.numel()

    def whole(pick) -> Tensor | None:
        parts = [pick(block) for block in blocks]
        return None if parts[0] is None else torch.cat(parts)[:rows]

    codes = whole(lambda b: b.codes)
    assert codes is not None
    return Parts(codes[:, :cols], whole(lambda b: b.scale), whole(lambda b: b.zero), whole(lambda b: b.row_scale))


def _codes(bits: int, lines: Tensor) -> Tensor:
    """[lines, panels, 16, 4] bytes -> [panels * 16, columns] codes."""
    if bits == 16:
        return lines.contiguous().view(torch.int16).permute(1, 2, 0, 3).flatten(0, 1).flatten(1)
    quads = lines[..., list(QUAD)].permute(1, 2, 0, 3)  # [panels, 16, lines, 4]
    if bits == 4:
        quads = torch.stack([quads & 15, quads >> 4], -2)
    return quads.flatten(0, 1).flatten(1)


def floats(spec: Format, parts: Parts) -> Tensor | None:
    """Scales of steps as float32 [rows, steps]."""
    if parts.scale is None:
        return None
    scale = parts.scale.contiguous()
    if spec.encoding.scales == torch.uint8:
        exponent = scale.squeeze(-1).double() - 127
        return torch.exp2(exponent).float()
    assert spec.encoding.scales is not None
    return scale.view(spec.encoding.scales).squeeze(-1).float()
