"""The types of GGUF's tensors: which format keeps their weights, and how their blocks become its codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.checkpoints.codes import Codes
from coterie.formats import Format, resolve


@dataclass(frozen=True, slots=True)
class Type:
    """A type of tensors.

    spec: the format that its weights are packed in, None for plain numbers. codes: makes codes of that format of
    blocks, uint8 [rows, blocks, bytes]; None where weights are dequantised and packed anew.
    """

    spec: Format | None
    codes: Callable[[Format, Tensor], Codes] | None = None


def _halves(packed: Tensor) -> Tensor:
    """Two codes to a byte [..., n], the first n of them in the low halves -> [..., 2n]."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _mxfp4(spec: Format, blocks: Tensor) -> Codes:
    return Codes(spec, _halves(blocks[..., 1:]).flatten(1), blocks[..., 0].contiguous(), None)


def _nvfp4(spec: Format, blocks: Tensor) -> Codes:
    """Four scales, then four times sixteen codes. 0x7f stands for 0; there are no signs."""
    scale = blocks[..., :4] & 0x7F
    scale = torch.where(scale == 0x7F, 0, scale).flatten(1).view(torch.float8_e4m3fn)
    codes = _halves(blocks[..., 4:].unflatten(-1, (4, 8))).flatten(1)
    return Codes(spec, codes, scale, torch.ones(len(blocks)))


TYPES = {
    **dict.fromkeys(("F32", "F16", "BF16"), Type(None)),
    "MXFP4": Type(resolve("mxfp4"), _mxfp4),
    "NVFP4": Type(resolve("nvfp4"), _nvfp4),
    # Packed anew: the nearest format that is not smaller.
    **dict.fromkeys(
        ("Q4_0", "Q4_1", "IQ4_NL", "IQ4_XS", "Q4_K", "Q5_0", "Q5_1", "Q5_K", "Q6_K", "Q8_0"),
        Type(resolve("int8", 32)),
    ),
    **dict.fromkeys(
        ("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"),
        Type(resolve("int4", 32)),
    ),
}


def widest(types: list[Type]) -> Format | None:
    """One format for weights of several types, none of which it is smaller than; None where all are plain."""
    specs = dict.fromkeys(found.spec for found in types)
    if set(specs) == {None}:
        return None
    return max((spec or resolve("bf16") for spec in specs), key=lambda spec: spec.matrix_nbytes(64, 256))
