"""A matrix that is quantised already, in the parts that `Experts.pack_codes` takes, and the numbers it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.checkpoints.records import scales_of
from coterie.formats import E2M1, IQ4, Format

SIGNED = (*E2M1, *(-value for value in E2M1))
# The values of 4-bit codes, by format.
VALUES = {"mxfp4": SIGNED, "nvfp4": SIGNED, "iq4_nl": IQ4, "iq4_xs": IQ4}
# The code of 0, where there are no zero points.
MIDDLE = {
    "int4": 8, "int8": 128, "q4_0": 8, "q8_0": 128, "q4_k": 0, "q6_k": 32, "q5_k": 0, "q4_1": 0, "q5_0": 16, "q5_1": 0,
    "q2_k": 0, "q3_k": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Codes:
    """A quantised matrix [rows, cols] of format `spec`.

    codes [rows, cols] in the encoding's own dtype, those of fewer than 8 bits one to a byte; scale [rows, groups], or
    of tiles [rows / tile_rows, groups], rounded up, or records of scales uint8 [rows, groups, bytes]; row_scale float32
    [rows]; zero, uint8, [rows, groups], or [rows] where rows have a scale. None: the format has no such part. A scale
    may be finer than the encoding's own: see `fitted`.
    columns: where each column belongs, where those of a group are no neighbours in the matrix; codes has them together.
    loss: the relative error of the weights that fitting them into the encoding made.
    """

    spec: Format
    codes: Tensor
    scale: Tensor | None
    row_scale: Tensor | None
    zero: Tensor | None = None
    columns: Tensor | None = None
    loss: float = 0.0

    @property
    def held(self) -> bool:
        """Whether the format can hold it."""
        return self.columns is None and (self.zero is None or self.spec.zero_point)

    def dequantize(self) -> Tensor:
        """Float32 [rows, cols]: the scales' product, rounded, times the code's value, as the kernels have it."""
        rows, minimum = self.codes.shape[0], None
        scale = torch.ones(rows, 1, device="cpu") if self.row_scale is None else self.row_scale[:, None]
        if self.scale is not None and self.spec.encoding.record:
            scale, minimum = scales_of(self.spec, self.scale)
        elif self.scale is not None:
            scale = scale * number(self.scale).repeat_interleave(self.spec.encoding.tile_rows, 0)[:rows]
        dense = self._values().mul_(self._columns(scale))
        if minimum is not None:
            dense.sub_(self._columns(minimum))
        return dense if self.columns is None else torch.empty_like(dense).index_copy_(1, self.columns, dense)

    def fitted(self) -> Codes:
        """The same as the encoding holds it: scales in its own dtype, and 8-bit codes from -127 on, not -128."""
        codes, scale, dtype = self.codes, self.scale, self.spec.encoding.scales
        if self.spec.name in ("int8", "q8_0") and not codes.numpy().all():
            codes = codes.clamp(min=1)
        if scale is not None and dtype is not None:
            scale = scale.to(dtype)
        fitted = replace(self, codes=codes, scale=scale)
        if codes is not self.codes:
            exact = self.dequantize()
            return replace(fitted, loss=((fitted.dequantize() - exact).norm() / exact.norm()).item())
        if scale is self.scale or torch.equal(number(scale), number(self.scale)):
            return fitted
        return replace(fitted, loss=self._loss_with(scale))

    def _loss_with(self, scale: Tensor) -> float:
        """The relative error that other scales of groups, which are not those of tiles, make of the weights."""
        squares = self._values().square_().unflatten(1, (scale.shape[1], -1)).sum(-1)
        exact = number(self.scale)
        error = (number(scale) - exact).square_().mul_(squares).sum() / exact.square().mul_(squares).sum()
        return error.sqrt().item()

    def each(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """The same with every part changed, [rows, ...] each; no part of the encoding is shared by rows."""
        return self._with(lambda part, tile: change(part))

    def rows(self, start: int, stop: int) -> Codes:
        """Rows start to stop; start is a multiple of the encoding's tile_rows."""
        return self._with(lambda part, tile: part[start // tile : -(-stop // tile)])

    def _with(self, change: Callable[[Tensor, int], Tensor]) -> Codes:
        """The same with every part changed; the function is told how many rows share one of the part's."""
        parts = {name: getattr(self, name) for name in ("codes", "scale", "row_scale", "zero")}
        tile_rows = {"scale": self.spec.encoding.tile_rows}
        changed = {name: change(part, tile_rows.get(name, 1)) for name, part in parts.items() if part is not None}
        return replace(self, **changed)

    def _values(self) -> Tensor:
        """Float32 [rows, cols]: what the codes stand for, without scales."""
        if self.zero is not None:
            return self.codes.float().sub_(self._columns(self.zero.float().view(len(self.codes), -1)))
        if self.spec.name in MIDDLE:
            return self.codes.float().sub_(MIDDLE[self.spec.name])
        if self.spec.name in VALUES:
            return torch.tensor(VALUES[self.spec.name], dtype=torch.float32, device="cpu")[self.codes.int()]
        return self.codes.float()

    def _columns(self, groups: Tensor) -> Tensor:
        """What belongs to each column, out of what belongs to all that share a scale [rows, groups]."""
        cols = self.codes.shape[1]
        return groups.repeat_interleave(self.spec.scale_columns or cols, 1)[:, :cols]


def number(scale: Tensor) -> Tensor:
    """Float32 of scales; uint8 ones are powers of two, 2^(byte - 127)."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()
