"""What this machine has for a model: bandwidth, arithmetic, NUMA nodes, a GPU; memory.py says how much memory."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie import _native, cpu
from coterie.experts import Experts

NUMA_SIZES = 1, 4096, 14336  # experts, H and I of the layer that is looked at: its matrices are many huge pages
HEADS, KEY_HEADS, TOKENS, WIDTH = 8, 2, 512, 128  # of the attention that is timed
ROW_WEIGHT = 65536, 4096  # 537 MB: more than caches hold, of which some servers have 300
LINK_NBYTES = 1 << 26  # of a copy to or from a GPU that is timed
GPU_NBYTES = 1 << 28  # of a copy within its memory: more than its caches hold
PACKING_ROWS, PACKING_COLUMNS = 1024, 2048  # of the matrix that the packing rate is measured with


def read_bandwidth() -> float:
    """Bytes per second that all threads together read from RAM (about a second's measurement)."""
    return _native.measure_read_bandwidth()


def dot_rate(format: str) -> float:
    """Operations per second (two a multiply-add) of the variant in use, all threads; `format` is "bf16" or "int8"."""
    return 2 * _native.measure_dot_rate(format == "int8")


def attention_rate(seconds: float = 0.2) -> float:
    """Operations per second (two a multiply-add, masked ones too) of a prompt's attention in bf16."""
    seed = torch.Generator("cpu").manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, TOKENS, WIDTH, generator=seed, dtype=torch.bfloat16, device="cpu")
        for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    if cpu.attends_to_prompts():
        attend = partial(_native.attend_prompt, query, key, value, None, WIDTH**-0.5)
    else:
        attend = partial(F.scaled_dot_product_attention, query, key, value, is_causal=True, enable_gqa=True)
    return 4 * HEADS * TOKENS**2 * WIDTH * _calls_per_second(attend, seconds)


def row_rate(seconds: float = 0.2) -> float:
    """Bytes of plain bf16 weights per second that are multiplied with one row, as in decoding with layers that are not
    packed."""
    weight = torch.ones(ROW_WEIGHT, dtype=torch.bfloat16, device="cpu")
    row = torch.ones(1, ROW_WEIGHT[1], dtype=torch.bfloat16, device="cpu")
    return weight.nbytes * _calls_per_second(partial(_native.plain_linear, row, weight, None), seconds)


def _calls_per_second(call: Callable[[], object], seconds: float) -> float:
    """Of the calls that fit in so many seconds, one at least, after one that is not counted."""
    call()
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < seconds:
        call()
        calls += 1
    return calls / (time.perf_counter() - start)


def packing_rate(format: str, seconds: float = 0.05) -> float:
    """Bytes of bf16 weights per second that are packed as `format`, scales searched, all threads."""
    experts = Experts.empty(1, PACKING_COLUMNS, PACKING_ROWS, format=format)
    seed = torch.Generator("cpu").manual_seed(0)
    weight = torch.randn(PACKING_ROWS, PACKING_COLUMNS, generator=seed, dtype=torch.bfloat16, device="cpu")
    experts.pack_projection("gate", 0, weight)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        experts.pack_projection("gate", 0, weight)
        done += weight.nbytes
    return done / (time.perf_counter() - start)


def numa_shares() -> dict[int, float]:
    """By NUMA node, the share of the expert weights it computes that its own memory holds; {} where there is one node.

    As the kernel reports it of a layer that is made for this; bytes of which it says nothing are left out. Raises
    DeviceError without 100 MB of memory.
    """
    if _native.numa_nodes() == 1:
        return {}
    found = Experts.empty(*NUMA_SIZES).numa_bytes()
    computed: Counter[int] = Counter()
    for (node, held_by), nbytes in found.items():
        computed[node] += nbytes if held_by is not None else 0
    return {node: found.get((node, node), 0) / total for node, total in sorted(computed.items()) if total}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One that torch sees; bytes of its memory, and of what is free of it now."""

    device: torch.device
    name: str
    capability: str
    memory: int
    free: int


def gpus() -> list[Gpu]:
    """The GPUs that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        free, _ = torch.cuda.mem_get_info(i)
        found.append(Gpu(torch.device("cuda", i), p.name, f"{p.major}.{p.minor}", p.total_memory, free))
    return found


def gpu_bandwidth(device: torch.device, seconds: float = 0.1) -> float:
    """Bytes per second that a GPU reads and writes of its own memory, in copies."""
    source = torch.ones(GPU_NBYTES, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    return 2 * GPU_NBYTES * _calls_per_second(partial(_copy, to, source), seconds)


def link_rates(device: torch.device, seconds: float = 0.1) -> tuple[float, float]:
    """Bytes per second copied from pinned memory to a GPU, and from it to pinned memory."""
    here = torch.ones(LINK_NBYTES, dtype=torch.uint8, device="cpu", pin_memory=device.type == "cuda")
    there = here.to(device)
    to_device = _calls_per_second(partial(_copy, there, here), seconds)
    return LINK_NBYTES * to_device, LINK_NBYTES * _calls_per_second(partial(_copy, here, there), seconds)


def _copy(to: Tensor, source: Tensor) -> None:
    """Returns when it is done."""
    to.copy_(source, non_blocking=True)
    if "cuda" in (to.device.type, source.device.type):
        torch.cuda.synchronize(to.device if to.device.type == "cuda" else source.device)
