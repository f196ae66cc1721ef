"""Experts in RAM for a model on a GPU, and on the GPU: are they right, and how fast. One JSON with every figure.

python benchmarks/gpu.py --output gpu.json                          on a machine with a GPU, under four minutes
python benchmarks/gpu.py --device cpu --tiny --output tiny.json     the script itself, anywhere

What fails stands in the JSON with its traceback, and the rest goes on; so does what there was no time for.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coterie import ExpertLora, Experts, cpu, machine, reference, versions
from coterie.bench.shapes import SHAPES, Shape
from coterie.bench.timing import median_seconds
from coterie.formats import FORMATS, Format, resolve
from coterie.gpu import rates, streaming

NAMES = ("gate_a", "gate_b", "up_a", "up_b", "down_a", "down_b")
SCALING = 2.0
LIMIT = 0.02  # of a relative error: bf16 activations, factors and gradients; weights are the same on both sides
RANKS = {"qwen3.5-35b": 16, "qwen3-30b": 32, "olmoe": 64, "mixtral": 16}
TINY = Shape(E=8, H=64, I=128, K=2)
SPECS = [*map(resolve, FORMATS), resolve("int4", 128, True), resolve("int8", 128)]

Forward = Callable[[Tensor, Tensor, Tensor, "ExpertLora | None"], Tensor]


class Bench:
    """What the sections share: where, how large, how long; and the file of what they found."""

    def __init__(self, device: str, tiny: bool, output: Path, minutes: float) -> None:
        self.device, self.tiny, self.output = torch.device(device), tiny, output
        self.started, self.deadline = time.monotonic(), time.monotonic() + 60 * minutes
        self.is_cuda = self.device.type == "cuda"
        self.seconds = 0.0 if tiny else 0.25  # of calls that a median is taken of
        self.random = torch.Generator(self.device).manual_seed(0)
        self.found: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": describe(self.device),
            "cpu": asdict(cpu.info()),
            "versions": versions.installed() | {"cuda": torch.version.cuda},
            "tiny": tiny,
            "sections": {},
        }

    def shape(self, name: str) -> Shape:
        return TINY if self.tiny else SHAPES[name]

    def section(self, name: str, compute: Callable[[], Any]) -> None:
        """Runs one, and writes what there is so far."""
        began = time.monotonic()
        if began > self.deadline:
            result: dict[str, Any] = {"skipped": "no time left"}
        else:
            try:
                result = {"figures": compute()}
            except Exception:
                result = {"error": traceback.format_exc()}
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()
        result["seconds"] = round(time.monotonic() - began, 2)
        self.found["sections"][name] = result
        self.found["seconds"] = round(time.monotonic() - self.started, 1)
        self.output.write_text(json.dumps(self.found, indent=1) + "\n")
        print(name, json.dumps(result.get("figures", result)), flush=True)

    def randn(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.random, device=self.device)

    def experts(self, shape: Shape, spec: Format) -> Experts:
        """Random ones in RAM, which compute with bf16 activations."""
        experts = Experts.empty(shape.E, shape.H, shape.I, format=spec)
        for name in experts.projections:
            rows, cols = experts.shape(name)
            for e in range(shape.E):
                matrix = (self.randn(rows, cols) / cols**0.5).to("cpu", torch.bfloat16)
                experts.pack_projection(name, e, matrix, scale_search=False)
        experts.adapt()
        return experts

    def batch(self, shape: Shape, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """x bf16 [T,H], ids of K different experts, routing weights."""
        scores = torch.rand(tokens, shape.E, generator=self.random, device=self.device)
        weights = torch.rand(tokens, shape.K, generator=self.random, device=self.device) / shape.K
        return self.randn(tokens, shape.H).bfloat16(), scores.topk(shape.K).indices, weights

    def lora(self, shape: Shape, rank: int) -> dict[str, Tensor]:
        up, down = (shape.I, shape.H), (shape.H, shape.I)
        sizes = [size for rows, cols in (up, up, down) for size in ((rank, cols), (rows, rank))]
        return {
            name: self.randn(shape.E, *size) / (size[1] ** 0.5 if name.endswith("a") else 10)
            for name, size in zip(NAMES, sizes, strict=True)
        }

    def wait(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], Any]) -> dict[str, float]:
        """Median milliseconds of a call, from the beginning until the GPU is done, and what it takes at its peak."""
        call()
        self.wait()
        before = 0
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()

        def once(_: int) -> None:
            call()
            self.wait()

        found = {"ms": round(1e3 * median_seconds(once, self.seconds), 4)}
        if self.is_cuda:
            found["peak_MB"] = round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
        return found


def describe(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": str(device)}
    found = torch.cuda.get_device_properties(device)
    return {"name": found.name, "memory": found.total_memory, "capability": f"{found.major}.{found.minor}"}


# --- right or wrong ---


def gradients(
    forward: Forward, x: Tensor, ids: Tensor, weights: Tensor, lora: dict[str, Tensor], grad: Tensor
) -> dict[str, Tensor]:
    """The output and every gradient."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in {"x": x, "weights": weights, **lora}.items()}
    factors = {name: leaf for name, leaf in leaves.items() if name in lora}
    adapters = ExpertLora(**factors, scaling=SCALING) if lora else None
    y = forward(leaves["x"], ids, leaves["weights"], adapters)
    found = torch.autograd.grad(y, list(leaves.values()), grad.to(y.dtype))
    return {"y": y.detach(), **dict(zip(leaves, found, strict=True))}


def relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.float(), expected.float()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def check(bench: Bench, shape: Shape, spec: Format, rank: int, tokens: int, some: bool) -> dict[str, Any]:
    """Relative errors against float32 on the same weights: in RAM, then on the device, or partly so."""
    experts = bench.experts(shape, spec)
    truth = [matrix.to(bench.device) for matrix in experts.dequantize()]
    x, ids, weights = bench.batch(shape, tokens)
    ids[0, 0] = -1
    ids[1, -1] = ids[1, 0]
    lora, grad = bench.lora(shape, rank), bench.randn(tokens, shape.H).bfloat16()
    expected = gradients(
        lambda x, ids, w, lora: reference.forward(x, ids, w, *truth, lora=lora), x.float(), ids, weights, lora, grad
    )
    figures: dict[str, Any] = {"shape": str(shape), "format": str(spec), "rank": rank, "tokens": tokens}
    for place in ("in RAM", "half on the device" if some else "on the device"):
        if place != "in RAM":
            experts.move(bench.device, range(0, shape.E, 2) if some else None)
        found = gradients(experts, x, ids, weights, lora, grad)
        errors = {name: relative(value, expected[name]) for name, value in found.items()}
        one = relative(experts(x[:1], ids[:1], weights[:1]), reference.forward(x[:1], ids[:1], weights[:1], *truth))
        worst = max(*errors.values(), one)
        figures[place] = {"right": worst < LIMIT, "worst": worst, "one token": one, **errors}
    return figures


# --- fast or slow ---


def grouped_dense(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The experts as torch's grouped products in bf16."""
    order = ids.flatten().argsort(stable=True)
    rows = torch.zeros(len(down), dtype=torch.int64, device=x.device)
    ends = rows.scatter_add_(0, ids.flatten(), torch.ones_like(order)).cumsum(0).int()
    gate, up = F.grouped_mm(x[order // ids.shape[1]], gate_up.mT, offs=ends).chunk(2, 1)
    y = F.grouped_mm(F.silu(gate) * up, down.mT, offs=ends) * weights.flatten()[order, None].to(x.dtype)
    return y[order.argsort()].view(*ids.shape, -1).sum(1)


def eager_dense(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """The experts one after the other."""
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        t, k = (ids == e).nonzero(as_tuple=True)
        gate, up = F.linear(x[t], gate_up[e]).chunk(2, 1)
        y = F.linear(F.silu(gate) * up, down[e]) * weights[t, k, None].to(x.dtype)
        out = out.index_add(0, t, y)
    return out


class Dense:
    """bf16 weights on the device; LoRA is added to them, as PEFT does."""

    def __init__(self, bench: Bench, shape: Shape, compute: Callable[..., Tensor]) -> None:
        self.compute = compute
        self.gate_up = (bench.randn(shape.E, 2 * shape.I, shape.H) / shape.H**0.5).bfloat16()
        self.down = (bench.randn(shape.E, shape.H, shape.I) / shape.I**0.5).bfloat16()

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None = None) -> Tensor:
        gate_up, down = self.gate_up, self.down
        if lora is not None:
            gate, up, down_product = (b.bfloat16() @ a.bfloat16() * SCALING for a, b in lora.pairs().values())
            gate_up, down = gate_up + torch.cat([gate, up], 1), down + down_product
        return self.compute(x, ids, weights, gate_up, down)


def times(bench: Bench, shape: Shape, make: Callable[[], Forward], tokens: Sequence[int]) -> dict[str, Any]:
    """Of one contestant: forward, forward and backward, the same with LoRA, by the number of tokens.

    TFLOP/s: of the frozen weights' products, which a backward has as many of as a forward.
    """
    forward, figures = make(), {}
    factors = {name: factor.requires_grad_() for name, factor in bench.lora(shape, 16).items()}
    lora = ExpertLora(**factors, scaling=SCALING)
    for count in tokens:
        x, ids, weights = bench.batch(shape, count)
        grad = torch.ones_like(x)

        def infer(x: Tensor = x, ids: Tensor = ids, weights: Tensor = weights) -> None:
            with torch.no_grad():
                forward(x, ids, weights, None)

        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()

        def step(
            lora: ExpertLora | None = None,
            leaves: tuple[Tensor, Tensor] = leaves,
            ids: Tensor = ids,
            grad: Tensor = grad,
        ) -> None:
            trained = [*leaves, *(factors.values() if lora else ())]
            torch.autograd.grad(forward(leaves[0], ids, leaves[1], lora), trained, grad)

        flops = 6 * count * shape.K * shape.H * shape.I
        for kind, call, work in (
            ("forward", infer, flops),
            ("step", step, 2 * flops),
            ("step with LoRA", partial(step, lora), 2 * flops),
        ):
            found = bench.timed(call)
            found["TFLOP/s"] = round(work / found["ms"] / 1e9, 3)
            figures[f"{kind}, T={count}"] = found
    return figures


def moved(bench: Bench, shape: Shape, spec: Format, experts: Sequence[int] | None = None) -> Experts:
    made = bench.experts(shape, spec)
    made.move(bench.device, experts)
    return made


def dequantise(bench: Bench, shape: Shape) -> dict[str, Any]:
    """Of the gate and up of some experts, to bf16: milliseconds, and GB/s of what is written."""
    figures: dict[str, Any] = {"shape": str(shape)}
    for spec in map(resolve, FORMATS):
        resident = moved(bench, shape, spec)._placement.resident
        call = partial(resident.dense, ("gate", "up"), torch.arange(shape.E, device=bench.device))
        figures[spec.name] = bench.timed(call)
        figures[spec.name]["GB/s"] = round(4 * shape.E * shape.H * shape.I / figures[spec.name]["ms"] / 1e6, 1)
    return figures


def decode(bench: Bench, shape: Shape, spec: Format, layers: int, tokens: Sequence[int]) -> dict[str, Any]:
    """Milliseconds a layer, of some layers one after the other, experts drawn anew for each call."""
    places = {"in RAM": [], "half on the device": range(shape.E // 2), "on the device": None}
    figures: dict[str, Any] = {"shape": str(shape), "format": str(spec), "layers": layers}
    for place, there in places.items():
        made = [bench.experts(shape, spec) if there == [] else moved(bench, shape, spec, there) for _ in range(layers)]
        for count in tokens:
            batches = [bench.batch(shape, count) for _ in range(32)]
            turn = iter(range(1 << 30))

            def call(made: list[Experts] = made, batches: list[Any] = batches, turn: Iterator[int] = turn) -> None:
                for experts in made:
                    experts(*batches[next(turn) % 32])

            with torch.no_grad():
                figures[f"{place}, T={count}"] = bench.timed(call)["ms"] / layers
                if there is None and bench.is_cuda:
                    figures[f"{place}, CUDA graph, T={count}"] = graphed(bench, made, batches) / layers
    return figures


def graphed(bench: Bench, layers: list[Experts], batches: list[tuple[Tensor, Tensor, Tensor]]) -> float:
    """Milliseconds of the same as one CUDA graph, its inputs copied in before."""
    inputs = [tensor.clone() for tensor in batches[0]]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for experts in layers:
            experts(*inputs)
    turn = iter(range(1 << 30))

    def call() -> None:
        for to, tensor in zip(inputs, batches[next(turn) % 32], strict=True):
            to.copy_(tensor)
        graph.replay()

    return bench.timed(call)["ms"]


def stream(bench: Bench, shape: Shape, spec: Format, tokens: Sequence[int]) -> dict[str, Any]:
    """Milliseconds of a layer's forward and step whose experts are in RAM, sent there, or on the device; by tokens.

    chosen: from how many tokens on, a power of two, they would be sent by the rates that are measured; with bf16
    activations, as they compute here.
    """
    figures: dict[str, Any] = {"shape": str(shape), "format": str(spec)}
    experts = bench.experts(shape, spec)
    if bench.is_cuda:
        found, to_and_from = rates.measured(bench.device), machine.link_rates(bench.device)
        layer = rates.Layer(shape.E, experts.expert_nbytes, 3 * shape.H * shape.I)
        figures |= {"rates": asdict(found), "link": to_and_from, "chosen": found.streams_from(shape.K, layer, False)}
    batches = {count: bench.batch(shape, count) for count in tokens}

    def place(name: str, call: Forward) -> None:
        for count, (x, ids, weights) in batches.items():
            leaf = x.clone().requires_grad_()

            def infer(x: Tensor = x, ids: Tensor = ids, weights: Tensor = weights) -> None:
                with torch.no_grad():
                    call(x, ids, weights, None)

            def step(leaf: Tensor = leaf, ids: Tensor = ids, weights: Tensor = weights) -> None:
                torch.autograd.grad(call(leaf, ids, weights, None), leaf, torch.ones_like(leaf))

            figures[f"{name}, forward, T={count}"] = bench.timed(infer)
            figures[f"{name}, step, T={count}"] = bench.timed(step)

    place("in RAM", experts)
    place("streamed", partial(streaming.compute, experts))
    experts.move(bench.device)
    place("on the device", experts)
    return figures


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--device", default="cuda")
    options.add_argument("--tiny", action="store_true", help="small shapes, one call each")
    options.add_argument("--minutes", type=float, default=3.5, help="no section begins after so long")
    options.add_argument("--output", type=Path, default=Path("gpu.json"))
    given = options.parse_args()
    bench = Bench(given.device, given.tiny, given.output, given.minutes)

    shape, int4 = bench.shape("qwen3-30b"), resolve("int4")
    tokens, few = ((1, 16), (1,)) if given.tiny else ((1, 16, 256, 4096, 32768), (1, 16))
    contestants: dict[str, Callable[[], Any]] = {
        "int4": lambda: moved(bench, shape, int4),
        "grouped_mm bf16": lambda: Dense(bench, shape, grouped_dense),
        "bf16": lambda: moved(bench, shape, resolve("bf16")),
        "eager bf16": lambda: Dense(bench, shape, eager_dense),
    }
    some, streamed = (1, tokens[:1]) if given.tiny else (3, (256, 1024, 4096))
    sections: dict[str, Callable[[], Any]] = {
        **{f"times {name}": partial(times, bench, shape, make, tokens) for name, make in contestants.items()},
        "stream": partial(stream, bench, shape, int4, streamed),
        "decode": partial(decode, bench, shape, int4, some, few),
        "dequantise": partial(dequantise, bench, TINY if given.tiny else Shape(E=32, H=2048, I=768, K=8)),
    }
    for name, rank in RANKS.items():
        sections[f"check {name}"] = partial(check, bench, bench.shape(name), int4, rank, 256, False)
    for spec in SPECS:
        small = TINY if given.tiny else Shape(E=16, H=2048, I=768, K=4)
        if spec.group_size and small.H % spec.group_size:
            small = Shape(E=8, H=128, I=128, K=2)
        options_of = f"{spec.name}-{spec.group_size or 'row'}{'-zero' if spec.zero_point else ''}"
        sections[f"check {options_of}"] = partial(check, bench, small, spec, 16, 96, True)
    for name, compute in sections.items():
        bench.section(name, compute)
    wrong = [name for name, result in bench.found["sections"].items() if "figures" not in result]
    wrong += [
        f"{name}: {place}"
        for name, result in bench.found["sections"].items()
        for place, figures in result.get("figures", {}).items()
        if isinstance(figures, dict) and figures.get("right") is False
    ]
    print(f"{bench.output}: {bench.found['seconds']} s; wrong or missing: {', '.join(wrong) or 'nothing'}")


if __name__ == "__main__":
    main()
