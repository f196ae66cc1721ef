"""How much memory there is, asked before it is taken: the system kills what takes too much."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from . import _native
from .errors import ArgumentError, DeviceError

UNITS = {"": 10**9, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
RAM_VARIABLE = "COTERIE_RAM"  # the memory to count on, where what the system says of it is wrong


def parse_bytes(text: str) -> int:
    """Bytes of "64GB" (10^9), "64GiB" (2^30), "512M"; a plain number is gigabytes. Raises ArgumentError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and UNITS.get(match[2].upper())
    if not match or unit is None:
        raise ArgumentError(f"expected a size like 64GB, 64GiB or 64 (gigabytes), found {text!r}")
    return int(float(match[1]) * unit)


@dataclass(frozen=True, slots=True)
class Memory:
    """RAM in bytes: what there is, and what a process could take now without swapping."""

    total: int
    available: int


def found() -> Memory:
    """The machine's memory, or what its control groups leave of it where that is less.

    COTERIE_RAM ("64GB") replaces what is available. Pages that only cache files count as available.
    """
    info = _numbers(PROC / "meminfo", factor=1024)
    total = info.get("MemTotal", os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    available = info.get("MemAvailable", total)
    for limit, used in _control_groups():
        total = min(total, limit)
        available = min(available, max(0, limit - used))
    given = os.environ.get(RAM_VARIABLE)
    return Memory(total, parse_bytes(given) if given else available)


def require(needed: int, what: str) -> None:
    """Raises DeviceError, with the numbers, unless `needed` bytes for `what` are available."""
    memory = found()
    if needed > memory.available:
        raise DeviceError(
            f"{what} needs {needed / 1e9:.3g} GB of RAM, {memory.available / 1e9:.3g} GB of "
            f"{memory.total / 1e9:.3g} GB are available: free some, choose smaller experts (`coterie plan` compares "
            f"them), or open a packed checkpoint with mmap=True; {RAM_VARIABLE}=64GB overrides what was found"
        )


def allocate(nbytes: int, what: str) -> Tensor:
    """Zeroed huge-page memory, uint8 [nbytes]. Raises DeviceError, with the numbers, where there is not enough."""
    require(nbytes, what)
    try:
        return _native.allocate(nbytes)
    except MemoryError:
        raise DeviceError(f"{what}: the system refuses {nbytes / 1e9:.3g} GB of memory") from None


def _control_groups() -> Iterator[tuple[int, int]]:
    """(limit, used without file cache) of this process's memory control groups, from its own up, those with a limit."""
    try:
        lines = (PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":  # version 2
            root, names, cached = CGROUP, ("memory.max", "memory.current"), ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            root, names = CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
            cached = "total_inactive_file", "total_active_file"
        else:
            continue
        relative = path.strip("/")
        for folder in (root / relative, *(root / p for p in Path(relative).parents), root):
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
            except (OSError, ValueError):
                continue  # no such file, or "max"
            stat = _numbers(folder / "memory.stat")
            yield limit, used - sum(stat.get(name, 0) for name in cached)


def _numbers(path: Path, factor: int = 1) -> dict[str, int]:
    """{name: value} of a file of "name value" lines; {} where it cannot be read."""
    try:
        rows = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    except OSError:
        return {}
    return {row[0]: int(row[1]) * factor for row in rows if len(row) > 1 and row[1].isdigit()}
