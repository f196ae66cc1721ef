"""Two checkpoints compared, tensor by tensor: what is in one alone, shapes, and how far the numbers are apart."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from coterie.checkpoints import packed
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.quantised import check_quantised
from coterie.checkpoints.tensorfile import DTYPES
from coterie.convert.linears import stored_linears
from coterie.convert.progress import Meter, Progress
from coterie.convert.tensors import AnyTensor, written_tensors
from coterie.errors import ArgumentError

PIECE = 1 << 20  # numbers that are compared at a time
Opened = tuple[Folder | None, Mapping[str, AnyTensor]]  # tensors by name, and the folder that they are read from


@dataclass(frozen=True, slots=True)
class TensorError:
    """The largest difference of two tensors' numbers, and ||a - b|| / ||a||; inf where one has NaN or Inf alone."""

    name: str
    dtypes: tuple[str, str]
    largest: float
    relative: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of checkpoint A with checkpoint B. shapes: tensors whose shapes differ, [A's, B's]; errors: of all others."""

    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    errors: tuple[TensorError, ...]
    tolerance: float

    @property
    def beyond(self) -> tuple[TensorError, ...]:
        """The tensors whose relative error is above the tolerance."""
        return tuple(error for error in self.errors if error.relative > self.tolerance)

    @property
    def same(self) -> bool:
        return not (self.only_a or self.only_b or self.shapes or self.beyond)


def open_folder(path: Path) -> Opened:
    """The tensors of a checkpoint, in the order of its files, quantised ones as float32."""
    is_packed = packed(path)
    folder = Folder(path)
    linears = stored_linears(folder, "F32") if is_packed else {}
    names = [name for name in folder.shard_of if name not in linears]
    tensors = written_tensors(folder, names, () if is_packed else check_quantised(folder), "F32")
    return folder, {tensor.name: tensor for tensor in tensors} | linears


def compare(
    a: str | os.PathLike,
    b: str | os.PathLike,
    tolerance: float = 0.0,
    progress: Progress | None = None,
    opened: Callable[[Path], Opened] = open_folder,
) -> Comparison:
    """Compares two checkpoints, a piece of a tensor at a time.

    Quantised weights and packed linear layers are compared by the numbers that they stand for, under the name that they
    have dequantised; packed experts byte by byte. dtypes may differ. `opened` opens each: that of
    `coterie.hf.converting.compare` GGUF files too. Raises ArgumentError for a tolerance below 0, CheckpointError for
    what cannot be read.
    """
    if not tolerance >= 0:
        raise ArgumentError(f"--tolerance is {tolerance}: expected 0 or more")
    (folder_a, tensors_a), (folder_b, tensors_b) = (opened(Path(path)) for path in (a, b))
    both = [name for name in tensors_a if name in tensors_b]
    shapes = {
        name: (tensors_a[name].shape, tensors_b[name].shape)
        for name in both
        if tensors_a[name].shape != tensors_b[name].shape
    }
    errors = []
    alike = [name for name in both if name not in shapes]
    meter = Meter(progress, 1, sum(tensors_a[name].nbytes for name in alike))
    for count, name in enumerate(alike, 1):
        first, second = tensors_a[name], tensors_b[name]
        largest, relative = apart(folder_a, first, folder_b, second)
        errors.append(TensorError(name, (first.dtype, second.dtype), largest, relative))
        meter.add(1, len(alike), count, first.nbytes)
    return Comparison(
        only_a=tuple(sorted(tensors_a.keys() - tensors_b.keys())),
        only_b=tuple(sorted(tensors_b.keys() - tensors_a.keys())),
        shapes=shapes,
        errors=tuple(errors),
        tolerance=tolerance,
    )


def apart(folder_a: Folder | None, a: AnyTensor, folder_b: Folder | None, b: AnyTensor) -> tuple[float, float]:
    """(the largest difference, ||a - b|| / ||a||) of two tensors of one shape, each of a checkpoint."""
    return _apart(_pairs(_numbers(folder_a, a), _numbers(folder_b, b)))


def _numbers(folder: Folder | None, tensor: AnyTensor) -> Iterator[Tensor]:
    """The numbers of a tensor, float64, piece by piece; its bytes where torch has no numbers for them."""
    dtype = DTYPES[tensor.dtype][1]
    for chunk in tensor.chunks(folder):
        if dtype is not None and not dtype.is_complex:
            chunk = (chunk if chunk.data_ptr() % dtype.itemsize == 0 else chunk.clone()).view(dtype)
        for piece in chunk.split(PIECE):
            yield piece.double()


def _pairs(first: Iterator[Tensor], second: Iterator[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pieces of equal length out of two sequences of as many numbers, cut in different places."""
    a = b = torch.empty(0, dtype=torch.float64, device="cpu")
    while True:
        while not len(a):
            if (found := next(first, None)) is None:
                next(second, None)  # ends too, and lets go of what it read
                return
            a = found
        while not len(b):
            b = next(second)
        count = min(len(a), len(b))
        yield a[:count], b[:count]
        a, b = a[count:], b[count:]


def _apart(pieces: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """(the largest difference, ||a - b|| / ||a||) of two tensors."""
    largest = squares = of_a = 0.0
    for a, b in pieces:
        alike = (a == b) | (a.isnan() & b.isnan())
        apart = torch.where(alike, 0.0, (a - b).abs()).nan_to_num(nan=math.inf)
        largest = max(largest, apart.max().item())
        squares += apart.square().sum().item()
        of_a += a[a.isfinite()].square().sum().item()
    if squares == 0:
        return largest, 0.0
    return largest, math.sqrt(squares / of_a) if of_a else math.inf
