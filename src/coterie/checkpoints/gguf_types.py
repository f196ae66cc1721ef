"""The types of GGUF's tensors: which format keeps their weights, and how their blocks become its codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coterie.checkpoints.codes import Codes
from coterie.fields import Field, spread
from coterie.formats import Format, resolve


@dataclass(frozen=True, slots=True)
class Type:
    """A type of tensors.

    spec: the format that its weights are packed in, None for plain numbers. codes: makes codes of that format of
    blocks, uint8 [rows, blocks, bytes]; None where weights are dequantised and packed anew.
    """

    spec: Format | None
    codes: Callable[[Format, np.ndarray], Codes] | None = None

    def keeps(self, spec: Format | None) -> bool:
        """Whether weights keep their codes in that format, None for plain numbers, which have none."""
        return self.spec is None or (self.spec == spec and self.codes is not None)


def _bytes(blocks: np.ndarray, *parts: tuple[int, int]) -> Tensor:
    """Bytes first to last of each block, of one part behind the other: [rows, blocks, bytes]."""
    return torch.from_numpy(np.concatenate([blocks[..., first:last] for first, last in parts], -1))


def _f16(blocks: np.ndarray, at: int) -> Tensor:
    """[rows, blocks]: the number at a byte of each block."""
    return torch.from_numpy(np.array(blocks[..., at : at + 2].view(np.float16)[..., 0], order="C"))


def _linear4(spec: Format, blocks: np.ndarray) -> Codes:
    """q4_0, and iq4_nl: an f16 scale, then 32 codes."""
    return Codes(spec, spread(blocks, 32, Field(2, 4, 16)), _f16(blocks, 0), None)


def _q8_0(spec: Format, blocks: np.ndarray) -> Codes:
    """An f16 scale, then 32 signed bytes."""
    return Codes(spec, spread(blocks, 32, Field(2, 8, 32), flip=128), _f16(blocks, 0), None)


def _q4_1(spec: Format, blocks: np.ndarray) -> Codes:
    """An f16 scale and an f16 that is added, then 32 codes."""
    return Codes(spec, spread(blocks, 32, Field(4, 4, 16)), _bytes(blocks, (0, 4)), None)


def _q5_0(spec: Format, blocks: np.ndarray) -> Codes:
    """An f16 scale, the fifth bits of 32 codes, then their lower four."""
    return Codes(spec, spread(blocks, 32, Field(6, 4, 16), Field(2, 1, 1)), _f16(blocks, 0), None)


def _q5_1(spec: Format, blocks: np.ndarray) -> Codes:
    """The same with an f16 behind the scale that is added."""
    return Codes(spec, spread(blocks, 32, Field(8, 4, 16), Field(4, 1, 1)), _bytes(blocks, (0, 4)), None)


def _iq4_xs(spec: Format, blocks: np.ndarray) -> Codes:
    """The record of scales, then eight times 32 codes."""
    return Codes(spec, spread(blocks, 256, Field(8, 4, 16)), _bytes(blocks, (0, 8)), None)


def _mxfp4(spec: Format, blocks: np.ndarray) -> Codes:
    return Codes(spec, spread(blocks, 32, Field(1, 4, 16)), _bytes(blocks, (0, 1)).squeeze(-1), None)


def _nvfp4(spec: Format, blocks: np.ndarray) -> Codes:
    """Four scales, then four times sixteen codes. 0x7f stands for 0; there are no signs."""
    scale = _bytes(blocks, (0, 4)) & 0x7F
    scale = torch.where(scale == 0x7F, 0, scale).flatten(1).view(torch.float8_e4m3fn)
    return Codes(spec, spread(blocks, 64, Field(4, 4, 8)), scale, torch.ones(len(blocks)))


def _q2_k(spec: Format, blocks: np.ndarray) -> Codes:
    """Sixteen scales and minima; the codes, for each 128 of them 32 bytes with four times 32; and two f16."""
    return Codes(spec, spread(blocks, 256, Field(16, 2, 32)), _bytes(blocks, (80, 84), (0, 16)), None)


def _q3_k(spec: Format, blocks: np.ndarray) -> Codes:
    """The third bits, 32 bytes with eight times 32; the lower two as of q2_k; twelve bytes of scales, and an f16."""
    codes = spread(blocks, 256, Field(32, 2, 32), Field(0, 1, 32))
    return Codes(spec, codes, _bytes(blocks, (108, 110), (96, 108)), None)


def _q4_k(spec: Format, blocks: np.ndarray) -> Codes:
    """The record of scales and minima, then four times 32 bytes, each with two times 32 codes."""
    return Codes(spec, spread(blocks, 256, Field(16, 4, 32)), _bytes(blocks, (0, 16)), None)


def _q5_k(spec: Format, blocks: np.ndarray) -> Codes:
    """The record of scales and minima, the fifth bits as q3_k's third, then as of q4_k."""
    return Codes(spec, spread(blocks, 256, Field(48, 4, 32), Field(16, 1, 32)), _bytes(blocks, (0, 16)), None)


def _q6_k(spec: Format, blocks: np.ndarray) -> Codes:
    """For each 128 codes the lower four bits, 64 bytes with two times 64; then for each 128 the upper two, 32 bytes
    with four times 32; sixteen scales, and an f16."""
    codes = spread(blocks, 256, Field(0, 4, 64), Field(128, 2, 32))
    return Codes(spec, codes, _bytes(blocks, (208, 210), (192, 208)), None)


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
