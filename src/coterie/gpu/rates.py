"""How fast experts are computed in RAM, and how fast on a device that they are sent to: measured, and compared.

Of a call of T tokens with K of E experts each, E (1 - (1 - K/E)^T) experts are expected to have tokens, and every token
takes 2 K operations for each weight of an expert. In RAM it lasts as long as the longer of reading those experts and of
the operations; on the device as long as both one after the other: sending hides some of the products, how many depends
on the pieces.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from coterie import _native, memory
from coterie.activations import Activation
from coterie.formats import resolve
from coterie.gpu.delivery import STAGED_NBYTES, deliver
from coterie.gpu.products import product
from coterie.gpu.resident import Resident
from coterie.gpu.stream import unpacked

MOST_TOKENS = 1 << 17
PIECES = 4  # that are sent to measure how fast
MATRIX = 768, 2048  # rows and columns of a matrix of those pieces, which are int4
EXPERTS, ROWS = 16, 128  # of the products that are timed on the device, and rows of each


@dataclass(frozen=True, slots=True)
class Layer:
    """How many experts there are, and the bytes and weights of one, packed."""

    experts: int
    nbytes: int
    weights: int


@dataclass(frozen=True, slots=True)
class Rates:
    """What is done in a second.

    read: bytes of packed experts read from RAM by the CPU. bf16, int8: operations, two a multiply-add, of its products
        with activations of either kind.
    delivered: bytes of packed experts brought to the device: staged, sent, unpacked and dequantised there.
    products: operations of the device's products in bf16.
    """

    read: float
    bf16: float
    int8: float
    delivered: float
    products: float

    def in_ram(self, nbytes: float, operations: float, integer: bool) -> float:
        """Seconds that the CPU takes."""
        return max(nbytes / self.read, operations / (self.int8 if integer else self.bf16))

    def streamed(self, nbytes: float, operations: float) -> float:
        """Seconds until the device is done."""
        return nbytes / self.delivered + operations / self.products

    def streams(self, tokens: int, per_token: int, layer: Layer, integer: bool) -> bool:
        """Whether sending the experts is faster, for tokens with so many experts each. integer: than int8 in RAM."""
        used = expected_experts(layer.experts, per_token, tokens)
        nbytes, operations = used * layer.nbytes, 2 * tokens * per_token * layer.weights
        return self.streamed(nbytes, operations) < self.in_ram(nbytes, operations, integer)

    def streams_from(self, per_token: int, layer: Layer, integer: bool) -> int | None:
        """The least power of two of tokens for which it is; None: for none up to `MOST_TOKENS`."""
        powers = (1 << n for n in range(MOST_TOKENS.bit_length()))
        return next((tokens for tokens in powers if self.streams(tokens, per_token, layer, integer)), None)


def expected_experts(experts: int, per_token: int, tokens: int) -> float:
    """How many of a layer's experts have tokens, were they chosen alike."""
    return experts * (1 - (1 - per_token / experts) ** tokens)


@functools.cache
def measured(device: torch.device) -> Rates:
    """The rates of this process for a device, measured once: about two seconds."""
    read = _native.measure_read_bandwidth()
    bf16, int8 = (2 * _native.measure_dot_rate(integer) for integer in (False, True))
    return Rates(read, bf16, int8, delivered(device), products(device))


def delivered(device: torch.device) -> float:
    """Bytes of packed experts that are brought to a device in a second: see `Rates`."""
    spec, (rows, cols) = resolve("int4"), MATRIX
    nbytes = spec.matrix_nbytes(rows, cols)
    count = max(1, STAGED_NBYTES // nbytes)
    data = memory.allocate(PIECES * count * nbytes, "measuring how fast experts are sent").fill_(1)
    pieces = [piece.split(nbytes) for piece in data.split(count * nbytes)]
    index = torch.arange(count, device=device)

    def send() -> None:
        for matrices in deliver(device, pieces, functools.partial(unpacked, spec, rows, cols)):
            Resident(device, {"up": matrices}, {}, Activation()).dense(("up",), index)

    return data.numel() / _seconds(device, send)


def products(device: torch.device) -> float:
    """Operations of a device's grouped products in bf16 in a second."""
    rows, cols = MATRIX
    x = torch.ones(EXPERTS * ROWS, cols, dtype=torch.bfloat16, device=device)
    weights = torch.ones(EXPERTS, cols, rows, dtype=torch.bfloat16, device=device)
    ends = (torch.arange(EXPERTS, device=device) + 1).int() * ROWS
    return 2 * x.numel() * rows / _seconds(device, lambda: product(x, weights, ends))


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    """The least of three calls, after one that is not counted."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
