"""What codes and scales stand for: parts of kernels that read packed matrices, and what these are told of a format."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from coterie.checkpoints.codes import MIDDLE, VALUES
from coterie.formats import E2M1, IQ4, Format

# Of codes: a number less a middle, a float of 8 or 4 bits, or an entry of a table.
NUMBER = tl.constexpr(0)
E4M3 = tl.constexpr(1)
FLOAT4 = tl.constexpr(2)
TABLE = tl.constexpr(3)
# Of scales: a float that Triton knows, E4M3, or a power of two.
PLAIN = tl.constexpr(0)
POWER = tl.constexpr(4)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by Triton's interpreter, whose bfloat16 is not all right


@triton.jit
def rounded(x):
    """bfloat16 of float32, to the nearest."""
    if INTERPRETED:  # it truncates
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def as_output(x, out):
    """Float32 in the dtype that `out` points to."""
    if out.dtype.element_ty == tl.bfloat16:
        return rounded(x)
    else:
        return x.to(out.dtype.element_ty)


@triton.jit
def value(code, table, KIND: tl.constexpr, MIDDLE: tl.constexpr):
    """Float32 of codes, int32, before zero points are taken off.

    The bits of a small float are those of a float32 that is a power of two too small, subnormal ones included.
    """
    if KIND == NUMBER:  # 2^23 + code is a float32 whose last bits are the code's: a cheaper conversion
        return (code | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + MIDDLE)
    elif KIND == E4M3:
        return (((code & 127) << 20) | ((code & 128) << 24)).to(tl.float32, bitcast=True) * (2.0**120)
    elif KIND == FLOAT4:
        return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * (2.0**126)
    else:
        return tl.load(table + code)


@triton.jit
def number(stored, KIND: tl.constexpr):
    """Float32 of scales as they are stored."""
    if KIND == PLAIN:
        return stored.to(tl.float32)
    elif KIND == E4M3:
        return value(stored.to(tl.int32), stored, E4M3, 0)
    else:
        power = stored.to(tl.int32)
        return tl.where(power == 0, 1 << 22, power << 23).to(tl.float32, bitcast=True)


def kind_of_codes(spec: Format) -> int:
    values = VALUES.get(spec.name)
    if values is not None:
        return FLOAT4.value if values[: len(E2M1)] == E2M1 else TABLE.value
    return E4M3.value if spec.encoding.codes == torch.float8_e4m3fn else NUMBER.value


def middle_of(spec: Format) -> float:
    return 0.0 if spec.zero_point else float(MIDDLE.get(spec.name, 0))


def kind_of_scales(scale: Tensor) -> int:
    if scale.dtype == torch.float8_e4m3fn:
        return E4M3.value
    return POWER.value if scale.dtype == torch.uint8 else PLAIN.value


def table_of(spec: Format, device: torch.device) -> Tensor | None:
    return torch.tensor(IQ4, device=device) if kind_of_codes(spec) == TABLE.value else None


def as_bytes(tensor: Tensor | None) -> Any:
    """What a kernel takes: 8-bit floats as their bits."""
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.float8_e4m3fn else tensor
