"""The tensors of a checkpoint that are not its experts, as a conversion writes them: plain ones as they are, quantised
ones dequantised, so that the packed checkpoint has no quantisation but coterie's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from coterie.checkpoints.codes import Codes
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.quantised import MARKS
from coterie.checkpoints.scheme import Scheme
from coterie.checkpoints.schemes import QUANTISED_STACKS, choose
from coterie.checkpoints.tensorfile import DTYPES, PLAIN_DTYPES, shown
from coterie.errors import CheckpointError
from coterie.formats import Format

CHUNK = 16 << 20
# Beside a quantised weight; a bias stays, and what scales a cache or a result says nothing of weights.
BESIDE = {".bias", ".k_scale", ".v_scale", ".q_scale", ".output_scale"}
# Dtypes that a weight has only where it is quantised.
CODES = ("F8_E4M3", "F8_E5M2", "U8", "I8", "I32", "F4")


class AnyTensor(Protocol):
    """A tensor of a checkpoint as it is written, or compared: see `Written`.

    quantised: whether codes stand for its numbers. source_nbytes: the bytes that it is made of.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def quantised(self) -> bool: ...
    def source_nbytes(self, folder: Any) -> int: ...
    def chunks(self, folder: Any) -> Iterator[Tensor]: ...


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor of a checkpoint that is no folder: `read` gives its numbers, piece by piece, made of `taken` bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Iterator[Tensor]]
    taken: int = 0
    quantised: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0] // 8

    def source_nbytes(self, folder: None = None) -> int:
        return self.taken

    def chunks(self, folder: None = None) -> Iterator[Tensor]:
        """Its bytes, uint8, piece by piece."""
        for piece in self.read():
            yield piece.to(DTYPES[self.dtype][1]).flatten().view(torch.uint8)


@dataclass(frozen=True, slots=True)
class Written:
    """A tensor to be written: its name, dtype as in a file, and shape.

    source: the tensor of the checkpoint that it is copied from or, with `scheme`, that has its codes. stacked: a stack
    of quantised matrices [E, out, in], written [E, in, out], as models have it whose checkpoints have such stacks.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: str
    scheme: Scheme | None = None
    stacked: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][0] // 8

    @property
    def quantised(self) -> bool:
        return self.scheme is not None

    def source_nbytes(self, folder: Folder) -> int:
        """Bytes of all that it takes the place of."""
        return sum(folder.nbytes(name) for name in self.names(folder))

    def names(self, folder: Folder) -> list[str]:
        """All tensors of the checkpoint that it takes the place of."""
        if self.scheme is None:
            return [self.source]
        return self.scheme.names(folder, self.source.removesuffix(self.scheme.codes.suffix))

    def tensor(self, folder: Folder) -> Tensor:
        """The tensor as it is written."""
        dtype = DTYPES[self.dtype][1]
        assert dtype is not None
        data, start = torch.empty(self.nbytes, dtype=torch.uint8, device="cpu"), 0
        for chunk in self.chunks(folder):
            data[start : start + len(chunk)] = chunk
            start += len(chunk)
        return data.view(dtype).view(self.shape)

    def format(self, folder: Folder, spec: Format | None) -> Format | None:
        """The format of the codes that `codes` gives, which are not read for it."""
        if self.scheme is None or self.stacked or spec not in (None, self.scheme.spec):
            return None
        held = self.scheme.held(folder, self.source.removesuffix(self.scheme.codes.suffix))
        return self.scheme.spec if held else None

    def codes(self, folder: Folder, spec: Format | None) -> Codes | None:
        """A weight that is quantised as `spec` already, so that this format holds it as it is; None for others. No
        `spec`: as any format."""
        if self.scheme is None or self.stacked:
            return None
        found = self.scheme.read(folder, self.source.removesuffix(self.scheme.codes.suffix))
        return found if isinstance(found, Codes) and spec in (None, found.spec) and found.held else None

    def release(self, folder: Folder) -> None:
        """Lets go of the memory that reading its codes took."""
        for name in self.names(folder):
            folder.release(name)

    def chunks(self, folder: Folder) -> Iterator[Tensor]:
        """Its bytes, uint8, piece by piece; memory that reading took is let go."""
        if self.scheme is None:
            for chunk in folder.file_of(self.source).bytes(self.source).split(CHUNK):
                yield chunk
                folder.release(self.source)
            return
        base, dtype = self.source.removesuffix(self.scheme.codes.suffix), DTYPES[self.dtype][1]
        if self.stacked:
            for index in range(self.shape[0]):
                codes = self.scheme.read(folder, base, index)
                assert isinstance(codes, Codes)
                yield codes.dequantize().T.to(dtype).contiguous().flatten().view(torch.uint8)
                self.scheme.release(folder, base, index, self.shape[0])
            return
        rows, cols = self.shape
        codes = self.scheme.read(folder, base)
        assert isinstance(codes, Codes)
        step = max(1, CHUNK // 4 // cols // 128) * 128
        for start in range(0, rows, step):
            dense = codes.rows(start, min(rows, start + step)).dequantize().to(dtype)
            yield dense.flatten().view(torch.uint8)
        self.scheme.release(folder, base)


def written_tensors(
    folder: Folder, names: Iterable[str], schemes: Sequence[Scheme], dtype: str | None = None
) -> list[Written]:
    """The tensors `names` as they are written, quantised weights, each stored by one of `schemes`, in `dtype` as files
    name it. None: the model's (bf16 where it does not say).

    Raises CheckpointError, naming the tensor, for a quantised weight that is in none of the formats that are read.
    """
    names, found, used = list(names), list[Written](), set[str]()
    if schemes:
        suffixes: dict[str, set[str]] = {}
        for name in names:
            base, _, last = name.rpartition(".")
            suffixes.setdefault(base, set()).add(f".{last}")
        dtype = dtype or _dtype(folder)
        for base, ends in suffixes.items():
            if not _quantised(folder, base, ends):
                continue
            scheme = choose(schemes, folder, base)
            size = scheme.size(folder, base)
            scheme.check(folder, base, size)
            unknown = sorted(ends - BESIDE - scheme.known)
            if unknown:
                raise _refusal(folder, base + unknown[0])
            found.append(Written(f"{base}.weight", dtype, size, base + scheme.codes.suffix, scheme))
            used.update(found[-1].names(folder))
        for stack in _stacks(folder, names, dtype):
            found.append(stack)
            used.update(stack.names(folder))
    for name in names:
        if name in used:
            continue
        entry = folder.file_of(name).entry(name)
        if schemes and (entry.dtype.startswith(("F8", "F4")) or name.endswith(tuple(MARKS))):
            raise _refusal(folder, name)
        found.append(Written(name, entry.dtype, entry.shape, name))
    return found


def _stacks(folder: Folder, names: Iterable[str], dtype: str) -> Iterator[Written]:
    for scheme in QUANTISED_STACKS:
        for name in names:
            base = name.removesuffix(scheme.codes.suffix)
            if base == name or not scheme.fits(folder, base):
                continue
            size = scheme.size(folder, base, stacked=True)
            scheme.check(folder, base, size)
            experts, rows, cols = size
            yield Written(base, dtype, (experts, cols, rows), name, scheme, stacked=True)


def _quantised(folder: Folder, base: str, ends: set[str]) -> bool:
    if ends & {*MARKS, ".weight_packed"}:
        return True
    return ".weight" in ends and folder.file_of(f"{base}.weight").entry(f"{base}.weight").dtype in CODES


def _dtype(folder: Folder) -> str:
    configs = (folder.text_config, folder.config)
    named = next((c[key] for c in configs for key in ("dtype", "torch_dtype") if isinstance(c.get(key), str)), "")
    names = {str(dtype).removeprefix("torch."): name for name, (_, dtype) in DTYPES.items() if name in PLAIN_DTYPES}
    return names.get(named, "BF16")


def _refusal(folder: Folder, name: str) -> CheckpointError:
    file = folder.file_of(name)
    return CheckpointError(
        f"{file.path}, tensor {shown(name)} ({file.entry(name).dtype}): this version does not know what it is to a "
        "quantised weight; use the original checkpoint"
    )
