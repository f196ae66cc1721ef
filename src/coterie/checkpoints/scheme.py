"""A way in which checkpoints store a matrix: what its tensors are called, what they hold, and how they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coterie.checkpoints.codes import MIDDLE, Codes
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.tensorfile import shown
from coterie.errors import CheckpointError
from coterie.fields import Field, spread
from coterie.formats import Format


class Part(NamedTuple):
    """One of a matrix's tensors: what ends its name, and the dtypes, as in the file, that it may have.

    in_element: numbers in an element, those of the low bits first, which follow each other in dimension `along` of the
    tensor as it is stored.
    """

    suffix: str
    dtypes: tuple[str, ...]
    in_element: int = 1
    along: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A way to store a matrix, or a stack of E of them.

    spec: the format that holds its codes; None for plain numbers.
    codes: [rows, cols]; `blocks`: [rows, groups, ...]. transposed: all parts are stored with their dimensions swapped.
    signed: codes are numbers around 0, less than as `Codes` has them by what stands for 0 there.
    halves: of eight numbers of 4 bits the 1st, 3rd, ... are in the lower half of an element, the others in the upper.
    scale: of groups, as in `Codes`. row_scale: [rows, 1], [rows], or one number for the matrix, which the weights are
    divided by where `divides` says so.
    zero: zero points of groups, or of rows, packed as codes are; `zero_less` is what they were stored less than.
    group_of: the group of each column, if it is there; where groups are no neighbours, codes cannot be kept.
    stated: what ends the name of the tensor with rows and columns, where there is one. ignored: the same of tensors
    that say nothing of the weights.
    """

    codes: Part
    spec: Format | None = None
    blocks: bool = False
    transposed: bool = False
    signed: bool = False
    halves: bool = False
    scale: Part | None = None
    row_scale: Part | None = None
    divides: bool = False
    zero: Part | None = None
    zero_less: int = 0
    group_of: Part | None = None
    stated: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def parts(self) -> list[Part]:
        """The tensors that a matrix must have, the codes first."""
        return [part for part in (self.codes, self.scale, self.row_scale, self.zero) if part is not None]

    @property
    def suffixes(self) -> list[str]:
        """What ends the names of those tensors."""
        return [part.suffix for part in self.parts]

    @property
    def known(self) -> set[str]:
        """What ends the names of all tensors that a matrix may have."""
        optional = (self.group_of.suffix if self.group_of else None, self.stated)
        return {*self.suffixes, *self.ignored, *(suffix for suffix in optional if suffix)}

    def fits(self, folder: Folder, base: str) -> bool:
        """Whether the tensors of matrix `base` are there, in dtypes of this scheme."""
        return all(
            base + part.suffix in folder.shard_of
            and folder.file_of(base + part.suffix).entry(base + part.suffix).dtype in part.dtypes
            for part in self.parts
        )

    def size(self, folder: Folder, base: str, stacked: bool = False) -> tuple[int, ...]:
        """(rows, cols) of matrix `base`, or (E, rows, cols). Raises CheckpointError for another dtype or dimensions."""
        dimensions = 2 + stacked
        found = folder.shape(base + self.codes.suffix, dimensions + self.blocks, self.codes.dtypes)
        size = [*found[: dimensions - 1], math.prod(found[dimensions - 1 :])]
        size[self.codes.along] *= self.codes.in_element
        if self.transposed:
            size[-2], size[-1] = size[-1], size[-2]
        return tuple(size)

    def check(self, folder: Folder, base: str, size: tuple[int, ...]) -> None:
        """Raises CheckpointError unless the tensors of `base` are those of a matrix, or of a stack, of that size."""
        if self.stated is not None and base + self.stated in folder.shard_of:
            name = base + self.stated
            found = folder.tensor(name).flatten().tolist()
            if found != list(size):
                raise CheckpointError(
                    f"{folder.file_of(name).path}, tensor {shown(name)}: says {found}, "
                    f"the codes are {self.spec.name if self.spec else 'plain'} {list(size)}"
                )
        *stack, rows, cols = size
        if self.blocks and self.spec is not None:
            within = self.spec.group_size // self.codes.in_element
            shape = *stack, rows, cols // self.spec.group_size, within
            folder.expect(base + self.codes.suffix, shape, self.codes.dtypes)
        else:
            self._expect(folder, base, self.codes, size)
        if self.spec is None:
            return
        tiles, groups = -(-rows // self.spec.encoding.tile_rows), -(-cols // (self.spec.group_size or cols))
        if self.scale is not None:
            self._expect(folder, base, self.scale, (*stack, tiles, groups))
        if self.zero is not None:
            self._expect(folder, base, self.zero, (*stack, rows, groups))
        if self.group_of is not None and base + self.group_of.suffix in folder.shard_of:
            folder.expect(base + self.group_of.suffix, (cols,), self.group_of.dtypes)
        if self.row_scale is not None:
            name, dtypes = base + self.row_scale.suffix, self.row_scale.dtypes
            file = folder.file_of(name)
            entry = file.entry(name)
            column = (1, rows) if self.transposed else (rows, 1)
            if entry.dtype not in dtypes or entry.shape not in (column, (rows,), (1,), ()):
                raise CheckpointError(
                    f"{file.path}, tensor {shown(name)}: {entry.dtype} {list(entry.shape)}, "
                    f"expected {' or '.join(dtypes)}, {list(column)}, or one number"
                )

    def _expect(self, folder: Folder, base: str, part: Part, size: tuple[int, ...]) -> None:
        """Raises CheckpointError unless a part is stored as one with `size` numbers is."""
        *stack, rows, cols = size
        shape = [*stack, cols, rows] if self.transposed else [*stack, rows, cols]
        if shape[part.along] % part.in_element:
            name = base + part.suffix
            raise CheckpointError(
                f"{folder.file_of(name).path}, tensor {shown(name)}: {shape} numbers, expected a multiple of "
                f"{part.in_element} of them in dimension {len(shape) + part.along}"
            )
        shape[part.along] //= part.in_element
        folder.expect(base + part.suffix, tuple(shape), part.dtypes)

    def names(self, folder: Folder, base: str) -> list[str]:
        """All tensors of matrix `base`, those that say nothing of the weights too."""
        return [base + suffix for suffix in sorted(self.known) if base + suffix in folder.shard_of]

    def nbytes(self, folder: Folder, base: str) -> int:
        """Bytes that hold the weights of `base`."""
        return sum(folder.nbytes(base + suffix) for suffix in self.suffixes)

    def symmetric(self, folder: Folder, base: str) -> bool:
        """Whether `spec` without zero points holds `base`: it has none, or all are the middle of the codes."""
        return self.zero is None or self._centred(self._numbers(folder, base, self.zero, None))

    def held(self, folder: Folder, base: str) -> bool:
        """Whether `spec` holds matrix `base` as it is. Of its tensors zero points and orders of columns alone are
        read."""
        if self.spec is None or self._scattered(folder, base, self.size(folder, base)[1]) is not None:
            return False
        return self.spec.zero_point or self.symmetric(folder, base)

    def without_zero_points(self) -> Scheme:
        """The same for matrices that are symmetric."""
        return self if self.spec is None else replace(self, spec=replace(self.spec, zero_point=False))

    def read(self, folder: Folder, base: str, index: int | None = None) -> Tensor | Codes:
        """Matrix `base`, or number `index` of the stack: [rows, cols]. Raises CheckpointError for NaN or Inf scales."""
        spec = self.spec
        if spec is None:
            return self._tensor(folder, base, self.codes, index)
        codes = self._numbers(folder, base, self.codes, index)
        if self.signed:
            codes = codes.view(torch.uint8) + MIDDLE[spec.name]  # round the clock: 8 bits
        rows, cols = codes.shape
        scale = row_scale = zero = None
        if self.scale is not None:
            scale = self._across(self._tensor(folder, base, self.scale, index))
            if spec.encoding.scales == torch.uint8:
                scale = scale.view(torch.uint8)
            else:
                _check_finite(folder, base + self.scale.suffix, scale)
        if self.row_scale is not None:
            row_scale = self._tensor(folder, base, self.row_scale, index).float().reshape(-1)
            row_scale = 1 / row_scale if self.divides else row_scale
            _check_finite(folder, base + self.row_scale.suffix, row_scale)
            row_scale = row_scale.expand(rows).contiguous()
        if self.zero is not None:
            zero = self._numbers(folder, base, self.zero, index)
            if not spec.zero_point and self._centred(zero):
                zero = None
            elif not spec.group_size:
                zero = zero.flatten()
        columns = self._scattered(folder, base, cols)
        if columns is not None:
            codes = codes[:, columns]
        return Codes(spec, codes.view(spec.encoding.codes), scale, row_scale, zero, columns)

    def release(self, folder: Folder, base: str, index: int = 0, count: int = 1) -> None:
        """Lets go of the memory that reading took."""
        for suffix in self.suffixes:
            folder.release(base + suffix, index, count)

    def _tensor(self, folder: Folder, base: str, part: Part, index: int | None) -> Tensor:
        tensor = folder.tensor(base + part.suffix)
        return tensor if index is None else tensor[index]

    def _across(self, stored: Tensor) -> Tensor:
        """A part with rows first."""
        return stored.T.contiguous() if self.transposed else stored

    def _numbers(self, folder: Folder, base: str, part: Part, index: int | None) -> Tensor:
        """Codes or zero points out of the elements that hold them: [rows, cols] or [rows, groups]."""
        stored = self._tensor(folder, base, part, index)
        if self.blocks:
            stored = stored.flatten(1)
        if part.in_element > 1:
            assert self.spec is not None
            if part is self.zero and self.zero_less:
                ones = sum(self.zero_less << self.spec.encoding.bits * n for n in range(part.in_element))
                stored = stored + ones  # of the element, as they were subtracted: a carry undoes a borrow
            stored = stored.movedim(part.along, -1).contiguous()
            stored = (_in_order(stored) if self.halves else stored).view(torch.uint8)
            if self.spec.encoding.bits == 4:
                stored = spread(stored.unsqueeze(1).numpy(), 2 * stored.shape[-1], Field(0, 4, 1))
            stored = stored.movedim(-1, part.along)
        return self._across(stored).contiguous()

    def _centred(self, zero: Tensor) -> bool:
        assert self.spec is not None
        return bool((zero == MIDDLE[self.spec.name]).all())

    def _scattered(self, folder: Folder, base: str, cols: int) -> Tensor | None:
        """The columns by group where those of a group are no neighbours, else None."""
        if self.group_of is None or self.spec is None or base + self.group_of.suffix not in folder.shard_of:
            return None
        name, size = base + self.group_of.suffix, self.spec.group_size or cols
        group_of = folder.tensor(name).long()
        neighbours = torch.arange(cols, device="cpu") // size
        if torch.equal(group_of, neighbours):
            return None
        columns = group_of.argsort(stable=True)
        if not torch.equal(group_of[columns], neighbours):
            raise CheckpointError(
                f"{folder.file_of(name).path}, tensor {shown(name)}: expected {size} columns in each group from 0 to "
                f"{cols // size - 1}"
            )
        return columns


def _in_order(elements: Tensor) -> Tensor:
    """Elements whose numbers are in halves, with the numbers in their order."""

    def apart(half: Tensor) -> Tensor:
        half = (half | half << 8) & 0x00FF00FF
        return (half | half << 4) & 0x0F0F0F0F

    return apart(elements & 0xFFFF) | apart(elements >> 16 & 0xFFFF) << 4


def _check_finite(folder: Folder, name: str, scale: Tensor) -> None:
    if not np.isfinite(scale.float().numpy()).all():
        raise CheckpointError(
            f"{folder.file_of(name).path}, tensor {shown(name)}: expected scales of which weights are finite numbers, "
            "found NaN, Inf or a division by 0"
        )
