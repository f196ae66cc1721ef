"""The CPU engine: what it found, what it uses, and how many threads."""

from __future__ import annotations

import functools
import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from . import _native
from .errors import ArgumentError, DeviceError

MAX_THREADS = 1024
logger = logging.getLogger(__name__)

# After each of torch's operators its OpenMP threads look out for the next, for milliseconds, on cores that the engine
# computes on meanwhile: a model decodes up to twice as fast where they soon sleep. GNU's OpenMP asks when it is loaded.
SPIN, POLICY = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
openmp_spins = "torch" in sys.modules and SPIN not in os.environ and os.environ.get(POLICY, "").lower() != "passive"
if "torch" not in sys.modules and POLICY not in os.environ:
    os.environ.setdefault(SPIN, "1000")


@dataclass(frozen=True, slots=True)
class CpuInfo:
    """What the engine sees of this machine."""

    model: str
    isa: str
    isa_reason: str
    isas: tuple[str, ...]
    cores: int
    threads: int
    numa_nodes: int
    huge_pages: str


def info() -> CpuInfo:
    """Instruction sets found and the one used, cores, threads, NUMA nodes and the huge-page setting.

    Raises:
        DeviceError: COTERIE_ISA names an instruction set that is unknown or that this CPU lacks.
    """
    isa = current_isa()
    return CpuInfo(
        model=_model_name(),
        isa=isa,
        isa_reason=_native.isa_reason(),
        isas=tuple(_native.available_isas()),
        cores=_native.available_cpus(),
        threads=threads(),
        numa_nodes=_native.numa_nodes(),
        huge_pages=_huge_pages(),
    )


def current_isa() -> str:
    """The instruction set the kernels use; raises DeviceError where COTERIE_ISA asks for one that cannot be had."""
    try:
        return _native.isa()
    except RuntimeError as error:
        raise DeviceError(str(error)) from None


def attends_to_prompts() -> bool:
    """Whether prompts' attention is the engine's; not where there are AMX's tiles, which torch uses and it does not."""
    return current_isa() != "amx"


def use_isa(name: str) -> None:
    """Switch the kernels of this process to another instruction set, to compare or test them."""
    try:
        _native.use_isa(name)
    except RuntimeError as error:
        raise DeviceError(str(error)) from None


def set_threads(n: int) -> None:
    """Use ``n`` threads, the calling one included. Results do not depend on it."""
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= MAX_THREADS:
        raise ArgumentError(f"threads: expected a whole number from 1 to {MAX_THREADS}, found {n!r}")
    _native.set_threads(n)


def threads() -> int:
    """Threads in use: what was set here or by COTERIE_THREADS, else the CPUs this process may use.

    Where torchrun or `accelerate launch` started several processes here (LOCAL_WORLD_SIZE), this one's share of them.
    """
    return _native.threads()


def read_environment() -> None:
    """Apply COTERIE_THREADS, or LOCAL_WORLD_SIZE; called once at import."""
    text = os.environ.get("COTERIE_THREADS")
    if text:
        if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MAX_THREADS):
            raise ArgumentError(f"COTERIE_THREADS: expected a whole number from 1 to {MAX_THREADS}, found {text!r}")
        set_threads(int(text))
        return
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    if processes.isascii() and processes.isdigit() and int(processes) > 1 and not _has_own_cpus():
        set_threads(max(1, _native.available_cpus() // int(processes)))


def _has_own_cpus() -> bool:
    """Whether this process was given fewer CPUs than its parent, as launchers do that bind processes to CPUs."""
    try:
        return len(os.sched_getaffinity(0)) < len(os.sched_getaffinity(os.getppid()))
    except OSError:
        return False


def _model_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unavailable"
    return text.partition("[")[2].partition("]")[0]


@functools.cache
def warn_of_spinning() -> None:
    """Says, once, that torch's threads will be in the way of the engine's, where they will, and what helps."""
    if openmp_spins:
        logger.warning(
            "torch was imported before coterie: between its operators its threads keep the engine's cores busy, and a "
            "model may take twice as long to decode. Import coterie first, or set OMP_WAIT_POLICY=passive"
        )
