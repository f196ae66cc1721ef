"""What a decoded token gains where linear attention, windows and gated MLPs are one call of the engine: a model's first
layers, random weights, with all of it and without a part, taking turns in one process.

    python benchmarks/decode_parts.py CONFIG.json --layers 4 --experts int4 --dense int4
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import coterie  # before torch

# isort: split
import torch

from coterie.bench.decode import Decoder
from coterie.bench.like import config_like
from coterie.bench.random_model import random_model
from coterie.bench.timing import take_turns
from coterie.formats import resolve
from coterie.hf.inference.delta import QuickDelta
from coterie.hf.inference.gated import QuickGated
from coterie.hf.inference.step import QuickLayer

PROMPT, VOCABULARY = 512, 8192
WITHOUT = ("nothing", "linear attention", "gated MLPs", "windows", "whole layers")


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
        elif isinstance(module, QuickGated):
            module.quick_kind, module.kind_tried = None, without == "gated MLPs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", default="int4")
    parser.add_argument("--dense", default="int4")
    parser.add_argument("--rounds", type=int, default=4)
    asked = parser.parse_args()
    config, _ = config_like(str(asked.config), layers=asked.layers, vocabulary=VOCABULARY)
    model = random_model(config, "eager", resolve(asked.experts), resolve(asked.dense)).eval()
    decoder = Decoder(model, torch.randint(VOCABULARY, (1, PROMPT)))

    def decode(without: str, number: int) -> None:
        if number == 0:
            allow(model, without)
        decoder(number)

    turns = take_turns({without: partial(decode, without) for without in WITHOUT}, 0.5, asked.rounds)
    print(f"ms of a token of {asked.layers} layers, {coterie.cpu.current_isa()}; medians of the rounds, and each")
    for without in WITHOUT:
        rounds = ", ".join(f"{1e3 * seconds:.2f}" for seconds in turns.rounds[without])
        print(f"  without {without}: {1e3 * turns.seconds(without):.2f} ({rounds})")


if __name__ == "__main__":
    main()
