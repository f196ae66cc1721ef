"""How much memory there is for packed weights, asked before it is taken: the system kills what takes too much."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from . import _native
from .errors import DeviceError

MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/proc/self/cgroup")
CGROUP_ROOT = Path("/sys/fs/cgroup")


def allocate(nbytes: int, what: str) -> Tensor:
    """Zeroed huge-page memory, uint8 [nbytes]. Raises DeviceError where there is not enough, saying how much is missing."""
    check(nbytes, what)
    try:
        return _native.allocate(nbytes)
    except MemoryError:
        raise DeviceError(f"{what}: the system refuses {_size(nbytes)} of memory") from None


def check(nbytes: int, what: str) -> None:
    """Raises DeviceError unless `nbytes` are available."""
    found = available()
    if found is not None and nbytes > found:
        raise DeviceError(
            f"{what}: expected {_size(nbytes)} of free memory, found {_size(found)}: {_size(nbytes - found)} are "
            "missing; close other programs, pack in a smaller format, or open a packed checkpoint with mmap=True"
        )


def available() -> int | None:
    """Bytes this process may still take without swapping: the system's, or its control groups' where that is less.

    None where the system does not say.
    """
    found = [left for left in (_system(), *_groups()) if left is not None]
    return max(0, min(found)) if found else None


def _system() -> int | None:
    return next((size << 10 for name, size in _pairs(MEMINFO) if name == "MemAvailable:"), None)


def _groups() -> list[int | None]:
    """What each control group above this process leaves; files that can be dropped from memory do not count as used."""
    left: list[int | None] = []
    for line in _lines(CGROUP):
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            root, limit, usage, prefix = CGROUP_ROOT, "memory.max", "memory.current", ""
        elif "memory" in kinds.split(","):
            root, limit, usage, prefix = (
                CGROUP_ROOT / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_",
            )  # fmt: skip
        else:
            continue
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if not folder.is_relative_to(root):
                break
            left.append(_left(folder, limit, usage, prefix))
    return left


def _left(folder: Path, limit: str, usage: str, prefix: str) -> int | None:
    most, used = (_number(folder / name) for name in (limit, usage))
    if most is None or used is None:
        return None
    droppable = {f"{prefix}inactive_file", f"{prefix}active_file"}
    return most - used + sum(size for name, size in _pairs(folder / "memory.stat") if name in droppable)


def _number(path: Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _pairs(path: Path) -> list[tuple[str, int]]:
    """(name, number) of each line that begins with them."""
    fields = [line.split() for line in _lines(path)]
    return [(f[0], int(f[1])) for f in fields if len(f) > 1 and f[1].isdigit()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
