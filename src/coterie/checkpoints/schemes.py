"""How checkpoints store a matrix: one row a scheme, which says what its tensors are called and what they hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coterie.checkpoints.codes import Codes
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.tensorfile import PLAIN_DTYPES, shown
from coterie.errors import CheckpointError
from coterie.formats import Format, resolve


class Part(NamedTuple):
    """One of a matrix's tensors: what ends its name, and the dtypes, as in the file, that it may have."""

    suffix: str
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """A way to store a matrix, or a stack of E of them.

    spec: the format that holds its codes and scales without loss; None for plain numbers.
    codes: [rows, cols], `in_element` of them in an element, those of the low bits first; `blocks`: [rows, groups, ...].
    scale: of groups, as in `Codes`. row_scale: [rows, 1], [rows], or one number for the matrix, which the weights are
    divided by where `divides` says so. stated: what ends the name of the tensor with rows and columns, where there is
    one. ignored: the same of tensors that say nothing of the weights.
    """

    codes: Part
    spec: Format | None = None
    in_element: int = 1
    blocks: bool = False
    scale: Part | None = None
    row_scale: Part | None = None
    divides: bool = False
    stated: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def known(self) -> set[str]:
        """What ends the names of all tensors that a matrix may have."""
        return {*self.suffixes, *self.ignored} | ({self.stated} if self.stated else set())

    @property
    def suffixes(self) -> list[str]:
        """What ends the names of a matrix's tensors, the codes' first."""
        return [part.suffix for part in (self.codes, self.scale, self.row_scale) if part is not None]

    def fits(self, folder: Folder, base: str) -> bool:
        """Whether the tensors of matrix `base` are there, in dtypes of this scheme."""
        return all(
            base + part.suffix in folder.shard_of
            and folder.file_of(base + part.suffix).entry(base + part.suffix).dtype in part.dtypes
            for part in (self.codes, self.scale, self.row_scale)
            if part is not None
        )

    def size(self, folder: Folder, base: str, stacked: bool = False) -> tuple[int, ...]:
        """(rows, cols) of matrix `base`, or (E, rows, cols). Raises CheckpointError for another dtype or dimensions."""
        dimensions = 2 + stacked
        found = folder.shape(base + self.codes.suffix, dimensions + self.blocks, self.codes.dtypes)
        return *found[: dimensions - 1], math.prod(found[dimensions - 1 :]) * self.in_element

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
        elements = cols // self.in_element
        columns = (elements,)
        if self.blocks and self.spec is not None:
            within = self.spec.group_size // self.in_element
            columns = elements // within, within
        folder.expect(base + self.codes.suffix, (*stack, rows, *columns), self.codes.dtypes)
        if self.scale is not None and self.spec is not None:
            tiles, groups = -(-rows // self.spec.encoding.tile_rows), -(-cols // self.spec.group_size)
            folder.expect(base + self.scale.suffix, (*stack, tiles, groups), self.scale.dtypes)
        if self.row_scale is not None:
            name, dtypes = base + self.row_scale.suffix, self.row_scale.dtypes
            file = folder.file_of(name)
            entry = file.entry(name)
            if entry.dtype not in dtypes or entry.shape not in ((rows, 1), (rows,), (1,), ()):
                raise CheckpointError(
                    f"{file.path}, tensor {shown(name)}: {entry.dtype} {list(entry.shape)}, "
                    f"expected {' or '.join(dtypes)}, {[rows, 1]}, or one number"
                )

    def names(self, folder: Folder, base: str) -> list[str]:
        """All tensors of matrix `base`, those that say nothing of the weights too."""
        return [base + suffix for suffix in sorted(self.known) if base + suffix in folder.shard_of]

    def nbytes(self, folder: Folder, base: str) -> int:
        """Bytes that hold the weights of `base`."""
        return sum(folder.nbytes(base + suffix) for suffix in self.suffixes)

    def read(self, folder: Folder, base: str, index: int | None = None) -> Tensor | Codes:
        """Matrix `base`, or number `index` of the stack: [rows, cols]. Raises CheckpointError for NaN or Inf scales."""
        codes = self._tensor(folder, base, self.codes, index)
        if self.spec is None:
            return codes
        encoding = self.spec.encoding
        if self.blocks:
            codes = codes.flatten(1)
        if self.in_element > 1:
            codes = codes.contiguous().view(torch.uint8)
            codes = torch.stack((codes & 15, codes >> 4), -1).flatten(1)
        scale = row_scale = None
        if self.scale is not None:
            scale = self._tensor(folder, base, self.scale, index)
            if encoding.scales == torch.uint8:
                scale = scale.view(torch.uint8)
            else:
                scale = _finite(folder, base + self.scale.suffix, scale.to(encoding.scales))
        if self.row_scale is not None:
            row_scale = self._tensor(folder, base, self.row_scale, index).float().reshape(-1)
            row_scale = _finite(folder, base + self.row_scale.suffix, 1 / row_scale if self.divides else row_scale)
            row_scale = row_scale.expand(codes.shape[0]).contiguous()
        return Codes(self.spec, codes.view(encoding.codes), scale, row_scale)

    def release(self, folder: Folder, base: str, index: int = 0, count: int = 1) -> None:
        """Lets go of the memory that reading took."""
        for suffix in self.suffixes:
            folder.release(base + suffix, index, count)

    def _tensor(self, folder: Folder, base: str, part: Part, index: int | None) -> Tensor:
        tensor = folder.tensor(base + part.suffix)
        return tensor if index is None else tensor[index]


def _finite(folder: Folder, name: str, scale: Tensor) -> Tensor:
    if not scale.float().isfinite().all():
        raise CheckpointError(
            f"{folder.file_of(name).path}, tensor {shown(name)}: expected scales of which weights are finite numbers, "
            "found NaN, Inf or a division by 0"
        )
    return scale


E4M3, U8 = ("F8_E4M3",), ("U8",)
PLAIN = (Scheme(codes=Part(".weight", PLAIN_DTYPES)),)
PLAIN_STACKS = (Scheme(codes=Part("", PLAIN_DTYPES)),)
QUANTISED = (
    # DeepSeek-V3, Qwen3 and MiniMax-M2 in FP8; compressed-tensors by blocks; what is not experts in DeepSeek-V4
    *(
        Scheme(spec=resolve("fp8_block"), codes=Part(".weight", E4M3), scale=scale, ignored=(".input_scale",))
        for scale in (
            Part(".weight_scale_inv", ("F32", "BF16")),
            Part(".weight_scale", ("F32", "BF16")),
            Part(".scale", ("F8_E8M0",)),
        )
    ),
    # compressed-tensors and ModelOpt, by rows or with one scale for the matrix
    Scheme(
        spec=resolve("fp8_channel"),
        codes=Part(".weight", E4M3),
        row_scale=Part(".weight_scale", PLAIN_DTYPES),
        ignored=(".input_scale",),
    ),
    # ModelOpt, and the same in compressed-tensors
    Scheme(
        spec=resolve("nvfp4"),
        codes=Part(".weight", U8),
        in_element=2,
        scale=Part(".weight_scale", E4M3),
        row_scale=Part(".weight_scale_2", ("F32",)),
        ignored=(".input_scale",),
    ),
    Scheme(
        spec=resolve("nvfp4"),
        codes=Part(".weight_packed", U8),
        in_element=2,
        scale=Part(".weight_scale", E4M3),
        row_scale=Part(".weight_global_scale", ("F32",)),
        divides=True,
        ignored=(".input_global_scale",),
    ),
    # ModelOpt and compressed-tensors
    Scheme(spec=resolve("mxfp8"), codes=Part(".weight", E4M3), scale=Part(".weight_scale", U8)),
    # DeepSeek-V4's experts; compressed-tensors
    Scheme(spec=resolve("mxfp4"), codes=Part(".weight", ("I8",)), in_element=2, scale=Part(".scale", ("F8_E8M0",))),
    Scheme(spec=resolve("mxfp4"), codes=Part(".weight_packed", U8), in_element=2, scale=Part(".weight_scale", U8)),
    # Kimi K2: compressed-tensors by groups, or by rows
    *(
        Scheme(
            spec=resolve("int4", group_size),
            codes=Part(".weight_packed", ("I32",)),
            in_element=8,
            scale=Part(".weight_scale", ("BF16",)) if group_size else None,
            row_scale=None if group_size else Part(".weight_scale", PLAIN_DTYPES),
            stated=".weight_shape",
        )
        for group_size in (32, 64, 128, 0)
    ),
)
QUANTISED_STACKS = (
    # gpt-oss
    Scheme(spec=resolve("mxfp4"), codes=Part("_blocks", U8), in_element=2, blocks=True, scale=Part("_scales", U8)),
)


def choose(schemes: Sequence[Scheme], folder: Folder, base: str, stacked: bool = False) -> Scheme:
    """The scheme of matrix `base`, or of that stack: the only one, or else the one that its tensors' names, dtypes and
    shapes fit. Raises CheckpointError where none does."""
    if schemes in (PLAIN, PLAIN_STACKS):
        return schemes[0]  # its own checks say best what does not fit
    fitting = [scheme for scheme in schemes if scheme.fits(folder, base)]
    if not fitting:
        entries = [folder.file_of(name).entry(name) for name in folder.shard_of if name.startswith(base)]
        found = ", ".join(f"{shown(e.name)} {e.dtype} {list(e.shape)}" for e in entries)
        expected = "; ".join(dict.fromkeys(_describe(scheme) for scheme in schemes))
        raise CheckpointError(
            f"{folder.path}: these tensors are in no quantised format that this version reads: {found or shown(base)}. "
            f"Expected names that end in: {expected}"
        )
    for scheme in fitting[:-1]:
        try:
            scheme.check(folder, base, scheme.size(folder, base, stacked))
        except CheckpointError:
            continue
        return scheme
    return fitting[-1]


def _describe(scheme: Scheme) -> str:
    parts = [part for part in (scheme.codes, scheme.scale, scheme.row_scale) if part is not None]
    return " with ".join(f"{part.suffix} ({' or '.join(part.dtypes)})" for part in parts)
