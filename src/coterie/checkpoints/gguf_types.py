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

    def keeps(self, spec: Format | None) -> bool:
        """Whether weights keep their codes in that format, None for plain numbers, which have none."""
        return self.spec is None or (self.spec == spec and self.codes is not None)


def _halves(packed: Tensor) -> Tensor:
    """Two codes to a byte [..., n], the first n of them in the low halves -> [..., 2n]."""
    return torch.cat((packed & 15, packed >> 4), -1)


def _linear4(spec: Format, blocks: Tensor) -> Codes:
    """q4_0, and iq4_nl: an f16 scale, then 32 codes."""
    return Codes(spec, _halves(blocks[..., 2:]).flatten(1), _f16(blocks, 0), None)


def _q8_0(spec: Format, blocks: Tensor) -> Codes:
    """An f16 scale, then 32 signed bytes."""
    return Codes(spec, (blocks[..., 2:] ^ 128).flatten(1), _f16(blocks, 0), None)


def _q4_1(spec: Format, blocks: Tensor) -> Codes:
    """An f16 scale and an f16 that is added, then 32 codes."""
    return Codes(spec, _halves(blocks[..., 4:]).flatten(1), blocks[..., :4].contiguous(), None)


def _fifth(packed: Tensor) -> Tensor:
    """The fifth bits of 32 codes, [..., 4] -> [..., 32]."""
    return torch.stack([packed >> bit & 1 for bit in range(8)], -1).flatten(-2) << 4


def _q5_0(spec: Format, blocks: Tensor) -> Codes:
    """An f16 scale, the fifth bits of 32 codes, then their lower four."""
    return Codes(spec, (_halves(blocks[..., 6:]) | _fifth(blocks[..., 2:6])).flatten(1), _f16(blocks, 0), None)


def _q5_1(spec: Format, blocks: Tensor) -> Codes:
    """The same with an f16 behind the scale that is added."""
    codes = _halves(blocks[..., 8:]) | _fifth(blocks[..., 4:8])
    return Codes(spec, codes.flatten(1), blocks[..., :4].contiguous(), None)


def _iq4_xs(spec: Format, blocks: Tensor) -> Codes:
    """The record of scales, then eight times 32 codes."""
    codes = _halves(blocks[..., 8:].unflatten(-1, (8, 16)))
    return Codes(spec, codes.flatten(1), blocks[..., :8].contiguous(), None)


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


def _two_bits(packed: Tensor) -> Tensor:
    """For each 128 codes 32 bytes with two bits of four times 32, [..., 64] -> [..., 256]."""
    parts = packed.unflatten(-1, (2, 32))
    return torch.cat([parts >> 2 * n & 3 for n in range(4)], -1).flatten(-2)


def _q2_k(spec: Format, blocks: Tensor) -> Codes:
    """Sixteen scales and minima, the codes, and two f16."""
    record = torch.cat([blocks[..., 80:84], blocks[..., :16]], -1)
    return Codes(spec, _two_bits(blocks[..., 16:80]).flatten(1), record, None)


def _eighths(packed: Tensor) -> Tensor:
    """A bit of eight times 32 codes, a byte for eight, [..., 32] -> [..., 256]."""
    return torch.cat([packed >> n & 1 for n in range(8)], -1)


def _q3_k(spec: Format, blocks: Tensor) -> Codes:
    """The third bits, the lower two, twelve bytes of scales, and an f16."""
    codes = _two_bits(blocks[..., 32:96]) | _eighths(blocks[..., :32]) << 2
    record = torch.cat([blocks[..., 108:110], blocks[..., 96:108]], -1)
    return Codes(spec, codes.flatten(1), record, None)


def _q4_k(spec: Format, blocks: Tensor) -> Codes:
    """The record of scales and minima, then four times 32 bytes, each with two times 32 codes."""
    return Codes(spec, _halves(blocks[..., 16:].unflatten(-1, (4, 32))).flatten(1), blocks[..., :16].contiguous(), None)


def _q5_k(spec: Format, blocks: Tensor) -> Codes:
    """The record of scales and minima, the fifth bits, then as of q4_k."""
    lower = _halves(blocks[..., 48:].unflatten(-1, (4, 32))).flatten(-2)
    return Codes(spec, (lower | _eighths(blocks[..., 16:48]) << 4).flatten(1), blocks[..., :16].contiguous(), None)


def _q6_k(spec: Format, blocks: Tensor) -> Codes:
    """For each 128 codes the lower four bits, 64 bytes with two times 64; then for each 128 the upper two, 32 bytes
    with four times 32; sixteen scales, and an f16."""
    lower = _halves(blocks[..., :128].unflatten(-1, (2, 64))).flatten(-2)
    record = torch.cat([blocks[..., 208:210], blocks[..., 192:208]], -1)
    return Codes(spec, (lower | _two_bits(blocks[..., 128:192]) << 4).flatten(1), record, None)


TYPES = {
    **dict.fromkeys(("F32", "F16", "BF16"), Type(None)),
    "MXFP4": Type(resolve("mxfp4"), _mxfp4),
    "NVFP4": Type(resolve("nvfp4"), _nvfp4),
    "Q4_0": Type(resolve("q4_0"), _linear4),
    "IQ4_NL": Type(resolve("iq4_nl"), _linear4),
    "IQ4_XS": Type(resolve("iq4_xs"), _iq4_xs),
    "Q4_1": Type(resolve("q4_1"), _q4_1),
    "Q5_0": Type(resolve("q5_0"), _q5_0),
    "Q5_1": Type(resolve("q5_1"), _q5_1),
    "Q8_0": Type(resolve("q8_0"), _q8_0),
    "Q2_K": Type(resolve("q2_k"), _q2_k),
    "Q3_K": Type(resolve("q3_k"), _q3_k),
    "Q4_K": Type(resolve("q4_k"), _q4_k),
    "Q5_K": Type(resolve("q5_k"), _q5_k),
    "Q6_K": Type(resolve("q6_k"), _q6_k),
    # Packed anew in what comes nearest.
    **dict.fromkeys(("TQ1_0", "TQ2_0"), Type(resolve("q4_0"))),
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), Type(resolve("iq4_nl"))),
}


def widest(types: list[Type]) -> Format | None:
    """One format for weights of several types, none of which it is smaller than; None where all are plain.

    Of formats of as many bits the one that keeps codes; at least 6 bits where several would have to: what is packed
    anew then loses little beside what its own type lost.
    """
    specs = dict.fromkeys(found.spec for found in types)
    if set(specs) == {None}:
        return None
    kept = {found.spec for found in types if found.spec is not None and found.codes is not None}
    several = [resolve("q6_k")] if len(kept) > 1 else []
    every = several + [spec or resolve("bf16") for spec in specs]
    return max(every, key=lambda spec: (spec.encoding.bits, spec in kept, spec.matrix_nbytes(64, 256)))
