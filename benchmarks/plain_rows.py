"""Bytes a second of a linear layer's bf16 weights for a few rows: by torch, by the engine as they lie, and packed.

python benchmarks/plain_rows.py
"""

from __future__ import annotations

import itertools

import coterie  # before torch

# isort: split
import torch
from torch.nn import functional

from coterie import _native, machine
from coterie.bench.timing import take_turns

SHAPES, ROWS = ((4096, 2048), (2048, 4096), (512, 2048), (151936, 2048)), (1, 2, 4, 8, 16)
AT_LEAST = 600_000_000  # bytes of copies, in turns: more than caches hold


@torch.inference_mode()
def main() -> None:
    print(f"GB/s of {machine.read_bandwidth() / 1e9:.1f}; {coterie.cpu.current_isa()}, {coterie.cpu.threads()} threads")
    for shape in SHAPES:
        copies = [torch.randn(shape).bfloat16() for _ in range(max(2, AT_LEAST // (2 * shape[0] * shape[1])))]
        packed = [coterie.Linear.pack(copy, format="bf16") for copy in copies]
        for rows in ROWS:
            x, number = torch.randn(rows, 1, shape[1]).bfloat16(), itertools.count()
            calls = {
                "torch": lambda _, x=x, n=number, c=copies: functional.linear(x, c[next(n) % len(c)]),
                "plain": lambda _, x=x, n=number, c=copies: _native.plain_linear(x, c[next(n) % len(c)], None),
                "packed": lambda _, x=x, n=number, c=packed: c[next(n) % len(c)](x),
            }
            turns = take_turns(calls, 0.2, 3)
            speeds = (f"{side} {copies[0].nbytes / turns.seconds(side) / 1e9:.1f}" for side in calls)
            print(f"{shape[0]} x {shape[1]}, {rows} rows: {', '.join(speeds)}")


if __name__ == "__main__":
    main()
