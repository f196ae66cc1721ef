"""What this machine has for a model: memory, bandwidth, arithmetic, a GPU."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from coterie import _native
from coterie.errors import ArgumentError, DeviceError
from coterie.experts import Experts

UNITS = {"": 10**9, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")
RAM_VARIABLE = "COTERIE_RAM"  # the memory to count on, where what the system says of it is wrong
PACKING_ROWS, PACKING_COLUMNS = 1024, 2048  # of the matrix that the packing rate is measured with


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


def memory() -> Memory:
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


def require_memory(needed: int, what: str) -> None:
    """Raises DeviceError, with the numbers, unless `needed` bytes for `what` are available."""
    found = memory()
    if needed > found.available:
        raise DeviceError(
            f"{what} needs {needed / 1e9:.3g} GB of RAM, {found.available / 1e9:.3g} GB of {found.total / 1e9:.3g} GB "
            f"are available: free some, choose smaller experts (`coterie plan` compares them), or open a packed "
            f"checkpoint with mmap=True; {RAM_VARIABLE}=64GB overrides what was found"
        )


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


def read_bandwidth() -> float:
    """Bytes per second that all threads together read from RAM (about a second's measurement)."""
    return _native.measure_read_bandwidth()


def dot_rate(format: str) -> float:
    """Operations per second (two a multiply-add) of the variant in use, all threads; `format` is "bf16" or "int8"."""
    return 2 * _native.measure_dot_rate(format == "int8")


def packing_rate(format: str, seconds: float = 0.2) -> float:
    """Bytes of bf16 weights per second that are packed as `format`, scales searched, all threads."""
    experts = Experts.empty(1, PACKING_COLUMNS, PACKING_ROWS, format=format)
    weight = torch.randn(PACKING_ROWS, PACKING_COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()
    experts.pack_projection("gate", 0, weight)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        experts.pack_projection("gate", 0, weight)
        done += weight.nbytes
    return done / (time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    memory: int  # bytes


def gpus() -> list[Gpu]:
    """The GPUs that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [Gpu(p.name, p.total_memory) for p in found]
