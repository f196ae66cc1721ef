"""The engine's threads on the CPUs that vLLM gave to a worker."""

from __future__ import annotations

import functools
import os
import re

import torch

from coterie import cpu
from coterie.linear import Linear

# How vLLM binds a worker's OpenMP threads: one of these, by the OpenMP that is loaded, and the list of CPUs in it.
BINDINGS = {
    "KMP_AFFINITY": re.compile(r"granularity=fine,explicit,proclist=\[([\d,]+)\]"),
    "GOMP_CPU_AFFINITY": re.compile(r"([\d ]+)"),
    "OMP_PLACES": re.compile(r"\{([\d,]+)\}"),
}


@functools.cache
def start_threads() -> None:
    """Starts the engine's threads: one for each CPU of this worker, the calling one included.

    OpenMP binds the calling thread to a single CPU, and new threads are bound as the one that starts them: so it is
    let go meanwhile. Where vLLM bound nothing, or COTERIE_THREADS says how many, the engine decides as ever.
    """
    given = worker_cpus()
    if not given or os.environ.get("COTERIE_THREADS"):
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, given)
    try:
        cpu.set_threads(len(given))
        Linear.pack(torch.zeros(64 * 2 * len(given), 64), format="bf16")(torch.zeros(1, 64))
    finally:
        os.sched_setaffinity(0, before)


def worker_cpus() -> set[int]:
    """The CPUs that vLLM bound this worker to; none where it bound it to none."""
    for name, pattern in BINDINGS.items():
        match = pattern.fullmatch(os.environ.get(name, ""))
        if match:
            return {int(number) for number in re.findall(r"\d+", match[1])}
    return set()
