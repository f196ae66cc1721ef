"""A whole model on a GPU, random weights: tokens per second, by where its experts are and how it decodes. One JSON.

python benchmarks/gpu_model.py --output model.json                  Qwen3-30B-A3B in int4, on a machine with a GPU

Needs 25 GB of RAM or of the GPU's memory. Each figure is the median difference of two answers of different lengths, so
that neither the prompt nor what is done once for an answer counts.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import coterie  # noqa: F401 (before torch, see README)
from coterie import cpu, versions
from coterie.bench.like import config_like
from coterie.bench.random_model import random_model
from coterie.formats import resolve
from coterie.hf.experts import NAME
from coterie.hf.modules import packed_modules

ROUNDS = 3
SHORT = 8  # tokens of an answer; by then all that is done once is done
WAYS = {"CUDA graph": {}, "a launch after the other": {"cache_implementation": "dynamic"}}


def make(like: str, layers: int, format: str, share: float) -> tuple[Any, float]:
    """The model with a share of each layer's experts on the GPU, and the seconds that took."""
    began = time.perf_counter()
    model = random_model(config_like(like, layers)[0], NAME, resolve(format))
    for _, packed in packed_modules(model):
        moved = round(share * packed.experts.num_experts)
        if moved:
            packed.experts.move("cuda", range(moved))
    return model.to("cuda"), time.perf_counter() - began


def seconds(model: Any, prompt: torch.Tensor, tokens: int, options: dict[str, Any]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **options)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def measured(model: Any, sequences: int, prompt: int, tokens: int, options: dict[str, Any]) -> dict[str, float]:
    """Tokens per second of all sequences together, milliseconds of a step, seconds until the first token."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(model.config.vocab_size, (sequences, prompt), generator=random).cuda()
    seconds(model, ids, SHORT, options)
    first = seconds(model, ids, 1, options)
    differences = [
        seconds(model, ids, SHORT + tokens, options) - seconds(model, ids, SHORT, options) for _ in range(ROUNDS)
    ]
    step = statistics.median(differences) / tokens
    return {"tokens/s": round(sequences / step, 2), "ms": round(1e3 * step, 3), "first": round(first, 3)}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--like", default="qwen3-30b", help="its sizes: a folder, a config.json, a hub id")
    options.add_argument("--layers", type=int, default=48)
    options.add_argument("--experts", default="int4", help="their format")
    options.add_argument("--shares", default="0,0.5,1", help="of each layer's experts on the GPU")
    options.add_argument("--sequences", default="1,8", help="decoded together")
    options.add_argument("--prompt", type=int, default=512)
    options.add_argument("--tokens", type=int, default=96)
    options.add_argument("--output", type=Path, default=Path("gpu_model.json"))
    given = options.parse_args()
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "cpu": asdict(cpu.info()),
        "versions": versions.installed(),
        "model": f"{given.like}, {given.layers} layers, {given.experts}",
    }
    for share in map(float, given.shares.split(",")):
        model, made = make(given.like, given.layers, given.experts, share)
        place: dict[str, Any] = {"made in": round(made, 1), "GB": round(torch.cuda.memory_allocated() / 1e9, 2)}
        found[f"{share:g} on the GPU"] = place
        for sequences in map(int, given.sequences.split(",")):
            for way, cache in WAYS.items():
                name = f"{sequences} together, {way}"
                place[name] = measured(model, sequences, given.prompt, given.tokens, cache)
                print(f"{share:g} on the GPU, {name}: {place[name]}", flush=True)
                given.output.write_text(json.dumps(found, indent=1) + "\n")
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
