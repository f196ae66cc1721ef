"""What a packed weight is made of. docs/format.md describes the bytes; native/formats/layout.h is the same in C++."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import ArgumentError

PANEL_ROWS = 16
COLUMN_ALIGN = 64
FORMATS = ("bf16", "int8", "int4")  # in the order of the native enum
GROUP_SIZES = (32, 64, 128)
BITS = {"bf16": 16, "int8": 8, "int4": 4}


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True, slots=True)
class Format:
    """A weight format.

    Attributes:
        name: ``bf16``, ``int8`` or ``int4``.
        group_size: columns that share one scale; 0 for one scale per row.
        zero_point: whether int4 codes have a zero point per scale instead of the fixed 8.
    """

    name: str
    group_size: int = 0
    zero_point: bool = False

    def matrix_nbytes(self, rows: int, cols: int) -> dict[str, int]:
        """Bytes of each part of a packed ``[rows, cols]`` matrix: ``weight``; ``scale``, ``zero`` where they exist."""
        rows, cols = round_up(rows, PANEL_ROWS), round_up(cols, COLUMN_ALIGN)
        parts = {"weight": rows * cols * BITS[self.name] // 8}
        groups = cols // self.group_size if self.group_size else 1
        if self.name != "bf16":
            parts["scale"] = rows * groups * (2 if self.group_size else 4)
        if self.zero_point:
            parts["zero"] = rows * groups
        return parts

    def check_columns(self, projection: str, cols: int) -> None:
        """Raise ArgumentError when the group size does not divide ``cols``."""
        if self.group_size and cols % self.group_size:
            raise ArgumentError(
                f"{projection}: {cols} columns are not a multiple of group_size={self.group_size}; "
                f"use group_size=0 (one scale per row) or one of {GROUP_SIZES} that divides it"
            )

    def layout(self, rows: int, cols: int) -> tuple[int, int, int, int, bool]:
        """The native engine's description of a ``[rows, cols]`` matrix."""
        return FORMATS.index(self.name), rows, cols, self.group_size, self.zero_point


def resolve(name: str, group_size: int | None = None, zero_point: bool = False) -> Format:
    """A format by name; ``group_size`` None means the format's default (int4: 32, int8: per row).

    Raises:
        ArgumentError: an unknown name, or an option the format does not have.
    """
    if name not in FORMATS:
        raise ArgumentError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}")
    if group_size is None:
        group_size = 32 if name == "int4" else 0
    if name == "bf16" and group_size:
        raise ArgumentError(f"bf16 has no scales: expected group_size 0 or None, found {group_size}")
    if group_size and group_size not in GROUP_SIZES:
        raise ArgumentError(f"group_size: expected 0 (per row) or one of {GROUP_SIZES}, found {group_size}")
    if zero_point and name != "int4":
        raise ArgumentError(f"zero_point is an option of int4, found with {name}")
    return Format(name, group_size, zero_point)
