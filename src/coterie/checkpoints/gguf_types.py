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


def _linear4(spec: Format, blocks: Tensor) -> Codes:
    """q4_0, and iq4_nl: an f16 scale, then 32 codes."""
    return Codes(spec, _halves(blocks[..., 2:]).flatten(1), _f16(blocks, 0), None)


def _q8_0(spec: Format, blocks: Tensor) -> Codes:
    """An f16 scale, then 32 signed bytes."""
    return Codes(spec, (blocks[..., 2:] ^ 128).flatten(1), _f16(blocks, 0), None)


def _q5_0(spec: Format, blocks: Tensor) -> Codes:
    """An f16 scale, the fifth bits of 32 codes, then their lower four; 16 stands for 0."""
    fifth = torch.stack([blocks[..., 2:6] >> bit & 1 for bit in range(8)], -1).flatten(-2)
    codes = _halves(blocks[..., 6:]) | fifth << 4
    return Codes(spec, (codes + (128 - 16)).flatten(1), _f16(blocks, 0), None)


def _iq4_xs(spec: Format, blocks: Tensor) -> Codes:
    """iq4_nl's codes, with one f16 scale for 256 columns and eight whole numbers of 6 bits, less 32, that it is
    multiplied by."""
    low = _halves(blocks[..., 4:8, None]).flatten(-2)
    high = torch.stack([blocks[..., 2 + n // 4] >> 2 * (n % 4) & 3 for n in range(8)], -1)
    scale = _f16(blocks, 0).float()[..., None] * ((low | high << 4).float() - 32)
    return Codes(spec, _halves(blocks[..., 8:].unflatten(-1, (8, 16))).flatten(1), scale.flatten(1), None)


def _f16(blocks: Tensor, at: int) -> Tensor:
    """[rows, blocks]: the number at a byte of each block."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16)[..., 0].contiguous()


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
    "Q4_0": Type(resolve("q4_0"), _linear4),
    "IQ4_NL": Type(resolve("iq4_nl"), _linear4),
    "IQ4_XS": Type(resolve("iq4_nl"), _iq4_xs),
    "Q5_0": Type(resolve("q8_0"), _q5_0),
    "Q8_0": Type(resolve("q8_0"), _q8_0),
    # Packed anew: in 8 bits where 4 would add an error as large as the type's own, else in what comes nearest.
    **dict.fromkeys(("Q4_1", "Q4_K", "Q5_1", "Q5_K", "Q6_K"), Type(resolve("q8_0"))),
    **dict.fromkeys(("Q3_K", "TQ1_0", "TQ2_0"), Type(resolve("q4_0"))),
    **dict.fromkeys(
        ("Q2_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), Type(resolve("iq4_nl"))
    ),
}


def widest(types: list[Type]) -> Format | None:
    """One format for weights of several types, none of which it is smaller than; None where all are plain.

    Of formats of 4 bits the one that keeps codes; 8 bits where two would have to.
    """
    specs = dict.fromkeys(found.spec for found in types)
    if set(specs) == {None}:
        return None
    kept = {found.spec for found in types if found.spec is not None and found.codes is not None}
    several = [resolve("q8_0")] if sum(spec.encoding.bits == 4 for spec in kept) > 1 else []
    every = several + [spec or resolve("bf16") for spec in specs]
    return max(every, key=lambda spec: (spec.encoding.bits, spec in kept, spec.matrix_nbytes(64, 256)))
