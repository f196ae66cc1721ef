"""What a decoded token, or a prompt, gains where linear attention, attention to latents, windows and gated MLPs are one
call of the engine: a model's first layers, random weights, with all of it and without a part, taking turns in one
process.

    python benchmarks/model_parts.py CONFIG.json --layers 4 --experts int4 --dense int4 [--prompt 8192] [--prefill]
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import coterie  # before torch

# isort: split
import torch

from coterie.bench.decode import Decoder, Prefill
from coterie.bench.like import config_like
from coterie.bench.random_model import random_model
from coterie.bench.timing import take_turns
from coterie.formats import resolve
from coterie.hf.inference.delta import QuickDelta
from coterie.hf.inference.gated import QuickGated
from coterie.hf.inference.latent import EXPANSION, QuickLatent
from coterie.hf.inference.step import QuickLayer

VOCABULARY = 8192
WITHOUT = ("nothing", "linear attention", "gated MLPs", "latents", "windows", "whole layers")
OF_PROMPTS = WITHOUT[:2]


def allow(model: torch.nn.Module, without: str) -> None:
    """Has the parts of a model be tried anew, but for those of a kind, which keep their own code."""
    windows = getattr(model.config, "layer_types", [])
    for number, layer in enumerate(model.get_decoder().layers):
        slides = number < len(windows) and windows[number] == "sliding_attention"
        if isinstance(layer, QuickLayer):
            layer.quick_step, layer.step_tried = None, without == "whole layers" or (without == "windows" and slides)
    for module in model.modules():
        if isinstance(module, QuickDelta):
            module.is_quick = False if without == "linear attention" else None
        elif isinstance(module, QuickLatent):
            expansion = module._modules[EXPANSION]
            tried = expansion, expansion.__dict__.get("packed"), model.dtype
            module.latent_proved, module.latent_weight = tried if without == "latents" else None, None
        elif isinstance(module, QuickGated):
            module.quick_kind, module.kind_parts = None, tuple(module.children()) if without == "gated MLPs" else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", default="int4")
    parser.add_argument("--dense", default="int4")
    parser.add_argument("--prefill", action="store_true", help="the prompt, not a token after it")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    config, _ = config_like(str(asked.config), layers=asked.layers, vocabulary=VOCABULARY)
    model = random_model(config, "eager", resolve(asked.experts), resolve(asked.dense)).eval()
    contestants, work = (OF_PROMPTS, Prefill) if asked.prefill else (WITHOUT, Decoder)
    call = work(model, torch.randint(VOCABULARY, (1, asked.prompt)))

    def run(without: str, number: int) -> None:
        if number == 0:
            allow(model, without)
        call(number)

    turns = take_turns({without: partial(run, without) for without in contestants}, 0.5, asked.rounds)
    timed = f"{asked.prompt} tokens" if asked.prefill else f"a token behind {asked.prompt}"
    print(f"ms of {timed}, {asked.layers} layers, {coterie.cpu.current_isa()}; medians of the rounds, and each")
    for without in contestants:
        rounds = ", ".join(f"{1e3 * seconds:.2f}" for seconds in turns.rounds[without])
        print(f"  without {without}: {1e3 * turns.seconds(without):.2f} ({rounds})")


if __name__ == "__main__":
    main()
