"""What a packed weight is made of. docs/format.md describes the bytes; native/formats/ is the same in C++."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import _native
from .errors import ArgumentError

PANEL_ROWS = 16
EXPERT_ALIGN = 4096  # an expert begins on a page of the file, and of memory
Layout = tuple[int, int, int, int, bool]  # encoding's number, rows, columns, group size, zero points


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The scales that a row has in a group of columns, as bytes; `checkpoints/records.py` says what they stand for.

    Attributes:
        nbytes: of it.
        numbers: f16 numbers with which it begins: one for the scales; another for minima, where such are taken off.
        parts: of the group, that have a scale each.
    """

    nbytes: int
    numbers: int
    parts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """How weights are coded.

    Attributes:
        bits: of a code.
        codes: dtype in which codes are taken as they are; 4-bit ones one to a byte.
        scales: dtype in which scales of groups (or of tiles) are taken as they are; None where there are none.
        group_sizes: columns that may share a scale, the default first; 0 for one scale per row, or none.
        zero_points: whether zero points can be stored.
        int8_activations: whether it can be multiplied with activations rounded to int8.
        tile_rows: rows that share a scale.
        row_scales: whether rows, or the matrix, have a float32 scale.
        record: in which a group has its scales where its columns have several; None: one scale.
    """

    bits: int
    codes: torch.dtype
    scales: torch.dtype | None = None
    group_sizes: tuple[int, ...] = (0,)
    zero_points: bool = False
    int8_activations: bool = False
    tile_rows: int = 1
    row_scales: bool = False
    record: Record | None = None

    @property
    def pads(self) -> bool:
        """Whether columns that are no whole number of groups are padded."""
        return self.tile_rows > 1 or self.record is not None


# What the codes of iq4_nl stand for.
IQ4 = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes of a 4-bit float
U8, E4M3 = torch.uint8, torch.float8_e4m3fn
# GGUF's scales for 256 columns: numbers of 6 bits with minima for each 32 columns, or alone; numbers of 6 bits, signed
# bytes, or numbers of 4 bits with minima, for each 16; and a scale and a minimum for 32.
WITH_MINIMA = Record(nbytes=16, numbers=2, parts=8)
OF_SIX_BITS = Record(nbytes=8, numbers=1, parts=8)
SIXTEEN_OF_SIX_BITS = Record(nbytes=14, numbers=1, parts=16)
OF_BYTES = Record(nbytes=18, numbers=1, parts=16)
OF_NIBBLES = Record(nbytes=20, numbers=2, parts=16)
WITH_START = Record(nbytes=4, numbers=2, parts=1)

# In the order of native/formats/encodings.h.
ENCODINGS = {
    "bf16": Encoding(bits=16, codes=torch.bfloat16),
    "int8": Encoding(bits=8, codes=U8, scales=torch.bfloat16, group_sizes=(0, 32, 64, 128), int8_activations=True),
    "int4": Encoding(
        bits=4, codes=U8, scales=torch.bfloat16, group_sizes=(32, 64, 128, 0), zero_points=True, int8_activations=True
    ),
    "fp8_block": Encoding(bits=8, codes=E4M3, scales=torch.float32, group_sizes=(128,), tile_rows=128),
    "fp8_channel": Encoding(bits=8, codes=E4M3, row_scales=True),
    "mxfp4": Encoding(bits=4, codes=U8, scales=U8, group_sizes=(32,), int8_activations=True),
    "mxfp8": Encoding(bits=8, codes=E4M3, scales=U8, group_sizes=(32,)),
    "nvfp4": Encoding(bits=4, codes=U8, scales=E4M3, group_sizes=(16,), int8_activations=True, row_scales=True),
    "q4_0": Encoding(bits=4, codes=U8, scales=torch.float16, group_sizes=(32,), int8_activations=True),
    "q8_0": Encoding(bits=8, codes=U8, scales=torch.float16, group_sizes=(32,), int8_activations=True),
    "iq4_nl": Encoding(bits=4, codes=U8, scales=torch.float16, group_sizes=(32,), int8_activations=True),
    "q4_k": Encoding(bits=4, codes=U8, scales=U8, group_sizes=(256,), int8_activations=True, record=WITH_MINIMA),
    "q6_k": Encoding(bits=6, codes=U8, scales=U8, group_sizes=(256,), int8_activations=True, record=OF_BYTES),
    "q5_k": Encoding(bits=5, codes=U8, scales=U8, group_sizes=(256,), int8_activations=True, record=WITH_MINIMA),
    "q4_1": Encoding(bits=4, codes=U8, scales=U8, group_sizes=(32,), int8_activations=True, record=WITH_START),
    "q5_0": Encoding(bits=5, codes=U8, scales=torch.float16, group_sizes=(32,), int8_activations=True),
    "q5_1": Encoding(bits=5, codes=U8, scales=U8, group_sizes=(32,), int8_activations=True, record=WITH_START),
    "iq4_xs": Encoding(bits=4, codes=U8, scales=U8, group_sizes=(256,), int8_activations=True, record=OF_SIX_BITS),
    "q2_k": Encoding(bits=2, codes=U8, scales=U8, group_sizes=(256,), int8_activations=True, record=OF_NIBBLES),
    "q3_k": Encoding(
        bits=3, codes=U8, scales=U8, group_sizes=(256,), int8_activations=True, record=SIXTEEN_OF_SIX_BITS
    ),
}
FORMATS = tuple(ENCODINGS)


@dataclass(frozen=True, slots=True)
class Format:
    """A weight format.

    Attributes:
        name: one of FORMATS.
        group_size: columns that share one scale, or one record of scales; 0 for one scale per row, or none.
        zero_point: whether codes have a zero point per scale instead of a fixed one.
    """

    name: str
    group_size: int = 0
    zero_point: bool = False

    @property
    def encoding(self) -> Encoding:
        return ENCODINGS[self.name]

    @property
    def described(self) -> str:
        """The format in words, for people to read."""
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        return self.name + groups + (" with zero points" if self.zero_point else "")

    @property
    def int8_activations(self) -> bool:
        """Whether it can be multiplied with activations rounded to int8."""
        return self.encoding.int8_activations

    @property
    def scale_columns(self) -> int:
        """Columns that share one scale; 0 for one scale per row, or none."""
        record = self.encoding.record
        return self.group_size if record is None else self.group_size // record.parts

    @property
    def row_scales(self) -> bool:
        """Whether each row has a float32 scale."""
        return self.encoding.row_scales or (self.encoding.scales is not None and not self.group_size)

    def matrix_nbytes(self, rows: int, cols: int) -> int:
        """Bytes of a packed ``[rows, cols]`` matrix."""
        return _native.matrix_bytes(self.layout(rows, cols))

    def check_columns(self, projection: str, cols: int) -> None:
        """Raise ArgumentError when the group size does not divide ``cols``."""
        if self.group_size and cols % self.group_size and not self.encoding.pads:
            others = [size for size in sorted(self.encoding.group_sizes) if size]
            choice = f"use group_size=0 (one scale per row) or one of {others} that divides it"
            raise ArgumentError(
                f"{projection}: {cols} columns are not a multiple of group_size={self.group_size}; "
                + (choice if len(others) > 1 else f"{self.name} needs one: use another format")
            )

    def layout(self, rows: int, cols: int) -> Layout:
        """The native engine's description of a ``[rows, cols]`` matrix."""
        return FORMATS.index(self.name), rows, cols, self.group_size, self.zero_point


@dataclass(frozen=True, slots=True)
class Formats:
    """The formats of a layer's experts.

    Attributes:
        gate_up: of gate and up.
        down: of down.
    """

    gate_up: Format
    down: Format

    @classmethod
    def of(cls, spec: Format | Formats) -> Formats:
        """Formats as they are, or one format for all."""
        return spec if isinstance(spec, Formats) else cls(spec, spec)

    def __getitem__(self, projection: str) -> Format:
        """That of gate, up or down."""
        return self.down if projection == "down" else self.gate_up

    @property
    def spec(self) -> Format | None:
        """The format of all; None where there are two."""
        return self.down if self.gate_up == self.down else None

    @property
    def name(self) -> str:
        """Its name, or those of gate and up, and of down: ``q4_k/q6_k``."""
        return "/".join(dict.fromkeys((self.gate_up.name, self.down.name)))

    @property
    def described(self) -> str:
        """The formats in words, for people to read."""
        return self.gate_up.described + ("" if self.spec else f" with down in {self.down.described}")

    @property
    def int8_activations(self) -> bool:
        """Whether all can be multiplied with activations rounded to int8."""
        return self.gate_up.int8_activations and self.down.int8_activations

    def layouts(self, hidden_size: int, intermediate_size: int) -> tuple[Layout, Layout]:
        """The native engine's descriptions of up, or gate, and down."""
        up, down = (intermediate_size, hidden_size), (hidden_size, intermediate_size)
        return self.gate_up.layout(*up), self.down.layout(*down)

    def expert_nbytes(self, hidden_size: int, intermediate_size: int, has_gate: bool) -> int:
        """Bytes of an expert's matrices, back to back, and of what fills its last page."""
        up, down = map(_native.matrix_bytes, self.layouts(hidden_size, intermediate_size))
        return round_up((1 + has_gate) * up + down, EXPERT_ALIGN)

    def check_columns(self, hidden_size: int, intermediate_size: int, where: str = "") -> None:
        """Raise ArgumentError, which begins with `where`, when a group size does not divide the columns of a matrix."""
        self.gate_up.check_columns(f"{where}gate and up", hidden_size)
        self.down.check_columns(f"{where}down", intermediate_size)


def resolve(name: str | Format, group_size: int | None = None, zero_point: bool = False) -> Format:
    """A format by name; ``group_size`` None means the format's default (int4: 32, int8: per row). A Format is itself.

    Raises:
        ArgumentError: an unknown name, or an option the format does not have.
    """
    if isinstance(name, Format):
        return name
    if name not in FORMATS:
        raise ArgumentError(f"unknown format {name!r}: expected one of {', '.join(FORMATS)}")
    encoding = ENCODINGS[name]
    if group_size is None:
        group_size = encoding.group_sizes[0]
    if group_size not in encoding.group_sizes:
        sizes = sorted(encoding.group_sizes)
        if sizes == [0]:
            raise ArgumentError(f"{name} has no groups: expected group_size 0 or None, found {group_size}")
        named = ", ".join("0 (per row)" if size == 0 else str(size) for size in sizes)
        raise ArgumentError(f"group_size of {name}: expected {named}, found {group_size}")
    if zero_point and not encoding.zero_points:
        raise ArgumentError(f"zero_point is an option of int4, found with {name}")
    return Format(name, group_size, zero_point)
