"""A matrix that is quantised already, packed into memory as it is."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _native
from .border import address
from .errors import ArgumentError
from .formats import Format


def pack_codes(
    label: str,
    spec: Format,
    shape: tuple[int, int],
    target: int,
    codes: Tensor,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> None:
    """Packs a matrix [rows, cols] of format `spec` at the address `target`. For the parts see `Experts.pack_codes`.

    Raises ArgumentError, which begins with `label`, for wrong shapes and dtypes, for a part that is missing or that the
    format does not have, and for codes and scales that are NaN; what is at `target` is of no use then.
    """
    rows, cols = shape
    groups, record = -(-cols // spec.group_size) if spec.group_size else 0, spec.encoding.record
    scales = (-(-rows // spec.encoding.tile_rows), groups, *((record.nbytes,) if record else ()))
    parts = (
        ("codes", codes, spec.encoding.codes, shape),
        ("scale", scale, spec.encoding.scales if groups else None, scales),
        ("zero", zero, torch.uint8 if spec.zero_point else None, (rows, groups) if groups else (rows,)),
        ("row_scale", row_scale, torch.float32 if spec.row_scales else None, (rows,)),
    )
    addresses = []
    for part, tensor, dtype, expected in parts:
        if tensor is not None and dtype is not None:
            addresses.append(address(f"{label}, {part}", tensor, (dtype,), expected))
        elif tensor is None and dtype is None:
            addresses.append(0)
        else:
            has, found = dtype or "none", "none" if tensor is None else list(tensor.shape)
            raise ArgumentError(f"{label}, {part}: {spec.name} has {has}, found {found}")
    if not _native.pack_codes(spec.layout(rows, cols), *addresses, target):
        raise ArgumentError(f"{label}: a code or a scale is NaN, or out of {spec.name}'s range")
