"""What this machine has for a model: memory, bandwidth, arithmetic, a GPU, and versions of what coterie needs."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from packaging.specifiers import SpecifierSet

from coterie import _native
from coterie.errors import ArgumentError

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
TESTED = {"torch": "==2.13.*", "transformers": ">=5.18,<5.24"}  # what the test suite has passed with
PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "accelerate", "peft", "trl")


def parse_bytes(text: str) -> int:
    """Bytes of "64GB" (10^9), "64GiB" (2^30), "512M" or a plain number. Raises ArgumentError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = match and UNITS.get(match[2].upper())
    if not match or unit is None:
        raise ArgumentError(f"expected a size like 64GB or 64GiB, found {text!r}")
    return int(float(match[1]) * unit)


def memory_bytes() -> int:
    """Bytes of RAM this process may use: the machine's, or its control group's limit where that is less."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in CGROUP_LIMITS:
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):
            continue  # no such file, or "max"
    return total


def read_bandwidth() -> float:
    """Bytes per second that all threads together read from RAM (about a second's measurement)."""
    return _native.measure_read_bandwidth()


def dot_rate(format: str) -> float:
    """Operations per second (two a multiply-add) of the variant in use, all threads; `format` is "bf16" or "int8"."""
    return 2 * _native.measure_dot_rate(format == "int8")


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


def untested() -> dict[str, str]:
    """{package: tested range} of those installed in a version that the test suite has not run with."""
    found = versions()
    return {name: tested for name, tested in TESTED.items() if not SpecifierSet(tested).contains(found[name])}


def versions() -> dict[str, str]:
    """Installed versions of Python, coterie and the packages it works with; "not installed" for an absent one."""
    found = {"python": platform.python_version()}
    for name in ("coterie", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
