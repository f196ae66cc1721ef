"""What a model takes of a GPU's memory, and how many of its experts have room there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coterie.formats import Format, Formats
from coterie.gpu.stream import unpacked

# Bytes for workspaces of CUDA's libraries, for what the allocator rounds up, and, where no kernel does it at once, for
# what a dense piece of the experts is made from.
WORK = 3 << 29
CONTEXT = 8192  # tokens of the KV cache that there is to be room for, where nothing else is said


def expert_nbytes(formats: Formats, hidden_size: int, intermediate_size: int, has_gate: bool) -> int:
    """Bytes that one expert's matrices take on a device, which has codes of 2, 3, 5 and 6 bits in a byte each."""
    up = _nbytes(formats.gate_up, intermediate_size, hidden_size)
    return (1 + has_gate) * up + _nbytes(formats.down, hidden_size, intermediate_size)


def _nbytes(spec: Format, rows: int, cols: int) -> int:
    data = torch.empty(1, spec.matrix_nbytes(rows, cols), dtype=torch.uint8, device="meta")
    return unpacked(spec, rows, cols, data).nbytes


def token_nbytes(per_token: int, hidden_size: int, intermediate_size: int) -> int:
    """Bytes that a token of a prompt needs in a layer of experts on a device, in bfloat16.

    For each of its experts: its input, output and place in the sum (3 H), gate and up, and what the activation makes
    of them, twice (4 I).
    """
    return 2 * per_token * (3 * hidden_size + 4 * intermediate_size)


@dataclass(frozen=True, slots=True)
class Room:
    """A device's memory and what is to lie there, in bytes.

    free: before anything of the model is there. rest: all of the model but the experts. cache: of one sequence of
    `tokens` tokens. token: `token_nbytes` of the largest layer. piece: of experts that are dense at a time
    (`resident.piece_nbytes`).
    layers: of each, how many experts it has and the bytes of one of them on the device.
    """

    free: int
    rest: int
    cache: int
    tokens: int
    token: int
    piece: int
    layers: tuple[tuple[int, int], ...]

    @property
    def work(self) -> int:
        """Kept for computing: WORK, a dense piece, and what the tokens of a prompt that fills the cache need."""
        return WORK + self.piece + self.tokens * self.token

    @property
    def besides(self) -> int:
        """All but experts: the rest of the model, the cache, and activations."""
        return self.rest + self.cache + self.work

    def experts(self, most: int) -> int:
        """Bytes of `most` experts of each layer, or all that it has."""
        return sum(min(most, count) * size for count, size in self.layers)

    @property
    def most(self) -> int:
        """The largest number of each layer's experts for which there is room beside all else; 0: for none."""
        numbers = range(max(count for count, _ in self.layers) + 1)
        return max((n for n in numbers if self.besides + self.experts(n) <= self.free), default=0)

    @property
    def missing(self) -> int:
        """Bytes that one expert of each layer would need besides; 0 where there is room for that."""
        return max(0, self.besides + self.experts(1) - self.free)
