"""Packed matrices taken apart by docs/format.md alone: another reader than the engine's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie import Experts
from coterie.formats import Format, round_up

# Numbers of 16 bits that records begin with.
HALVES = {"q4_k": 2, "q6_k": 1, "q5_k": 2, "q4_1": 2, "q5_1": 2, "iq4_xs": 1, "q2_k": 2, "q3_k": 1}
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
        size = experts.formats[other].matrix_nbytes(*experts.shape(other))
        if other == name:
            return data[start : start + size]
        start += size
    raise KeyError(name)


def take_apart(spec: Format, rows: int, cols: int, data: Tensor) -> Parts:
    encoding = spec.encoding
    step = spec.group_size or 64
    padded = round_up(cols, max(64, step))
    step_scale = 0 if not spec.group_size or encoding.scales is None or encoding.record else encoding.scales.itemsize
    blocks, at = [], 0
    for first in range(0, rows, 64):
        panels = min(4, -(-(rows - first) // 16))
        found = Parts([], [], [], None)  # type: ignore[arg-type]
        for _ in range(padded // step):
            if encoding.record:
                of_panels = data[at : at + panels * 16 * encoding.record.nbytes].view(panels, -1)
                found.scale.append(torch.cat([_records(of_panel, spec) for of_panel in of_panels]))
                at += panels * 16 * encoding.record.nbytes
            lines = data[at : at + step * encoding.bits // 32 * panels * 64].view(-1, panels, 16, 4)
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


def _records(panel: Tensor, spec: Format) -> Tensor:
    """Bytes of a panel -> [16, bytes]: numbers of 16 bits of all rows, one after another, and then bytes."""
    rows = torch.empty(16, spec.encoding.record.nbytes, dtype=torch.uint8)
    for i in range(rows.shape[1]):
        wide = i < 2 * HALVES[spec.name]
        rows[:, i] = panel[i // 2 * 32 + i % 2 :: 2][:16] if wide else panel[16 * i : 16 * i + 16]
    return rows


def _codes(bits: int, lines: Tensor) -> Tensor:
    """[lines, panels, 16, 4] bytes -> [panels * 16, columns] codes."""
    if bits == 16:
        return lines.contiguous().view(torch.int16).permute(1, 2, 0, 3).flatten(0, 1).flatten(1)
    quads = lines[..., list(QUAD)].permute(1, 2, 0, 3)  # [panels, 16, lines, 4]
    if bits in (5, 6):
        high = bits - 4
        quads = quads.unflatten(2, (-1, bits // high))  # [panels, 16, runs, lines, 4]
        upper = [quads[..., 0, :] >> high * n & (1 << high) - 1 for n in range(8 // high)]
        lower = [quads[..., 1 + n // 2, :] >> 4 * (n % 2) & 15 for n in range(8 // high)]
        quads = torch.stack([u << 4 | v for u, v in zip(upper, lower, strict=True)], -2)
    if bits == 3:
        upper, *lower = quads.unflatten(2, (-1, 3)).unbind(-2)
        quads = torch.stack([lower[n // 2] >> n % 2 * 2 & 0x33 | (upper >> n & 0x11) << 2 for n in range(4)], -2)
        bits = 4  # four lines of such codes, made of three
    if bits == 2:
        quads = torch.stack([quads >> 2 * n & 3 for n in range(4)], -2)
    if bits == 4:
        quads = torch.stack([quads & 15, quads >> 4], -2)
    return quads.flatten(0, 1).flatten(1)


def floats(spec: Format, parts: Parts) -> Tensor | None:
    """Scales as float32 [rows, steps], or as many for each step as there are."""
    if parts.scale is None:
        return None
    scale = parts.scale.contiguous()
    if spec.encoding.record:
        return _of_parts(spec, scale, 0)
    if spec.encoding.scales == torch.uint8:
        exponent = scale.squeeze(-1).double() - 127
        return torch.exp2(exponent).float()
    assert spec.encoding.scales is not None
    return scale.view(spec.encoding.scales).squeeze(-1).float()


def minima(spec: Format, parts: Parts) -> Tensor | None:
    """What is taken off, as float32 [rows, steps * parts]."""
    if not spec.encoding.record or HALVES[spec.name] < 2:
        return None
    assert parts.scale is not None
    return _of_parts(spec, parts.scale, 1)


def _of_parts(spec: Format, records: Tensor, which: int) -> Tensor:
    unit = records[..., 2 * which : 2 * which + 2].contiguous().view(torch.float16).float()
    own = records[..., 2 * HALVES[spec.name] :].int()
    factors = [FACTORS[spec.name](own, part, which) for part in range(spec.encoding.record.parts)]
    return (unit * torch.stack(factors, -1)).flatten(1)


def _six_bits(own: Tensor, part: int, which: int) -> Tensor:
    """Of scales (0) and minima (1)."""
    if part < 4:
        return own[..., part + 4 * which] % 64
    return own[..., part + 4] // 16**which % 16 + own[..., part - 4 + 4 * which] // 64 * 16


def _signed(own: Tensor, part: int, which: int) -> Tensor:
    return (own[..., part] + 128) % 256 - 128


def _six_bits_less_32(own: Tensor, part: int, which: int) -> Tensor:
    return own[..., 2 + part // 2] // 16 ** (part % 2) % 16 + own[..., part // 4] // 4 ** (part % 4) % 4 * 16 - 32


def _sixteen_of_six_bits(own: Tensor, part: int, which: int) -> Tensor:
    return own[..., part % 8] // 16 ** (part // 8) % 16 + own[..., 8 + part % 4] // 4 ** (part // 4) % 4 * 16 - 32


def _nibbles(own: Tensor, part: int, which: int) -> Tensor:
    return own[..., part] // 16**which % 16


def _itself(own: Tensor, part: int, which: int) -> Tensor:
    """What is added is taken off below 0."""
    return torch.full(own.shape[:-1], -1 if which else 1)


FACTORS = {
    "q4_k": _six_bits, "q6_k": _signed, "q5_k": _six_bits, "q4_1": _itself, "q5_1": _itself,
    "iq4_xs": _six_bits_less_32, "q2_k": _nibbles, "q3_k": _sixteen_of_six_bits,
}  # fmt: skip


def random_records(spec: Format, rows: int, groups: int, random: torch.Generator) -> Tensor:
    """Any bytes, and units of moderate size."""
    record = torch.randint(0, 256, (rows, groups, spec.encoding.record.nbytes), generator=random, dtype=torch.uint8)
    halves = HALVES[spec.name]
    units = torch.rand(rows, groups, halves, generator=random).half() / 100 + 0.001
    record[..., : 2 * halves] = units.contiguous().view(torch.uint8)
    return record
