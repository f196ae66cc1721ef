"""A GGUF file end to end, beside llama.cpp on the same file: prefill and decode tokens per second, taking turns.

    bash benchmarks/peers/setup.sh && python benchmarks/peers/gguf_duel.py --dense own    # also int8, q4_k, none
    python benchmarks/peers/gguf_duel.py --model glm-4.7-flash --prompt 4096

The file has random blocks in Q4_K_M's types: see gguf_model.py.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

from e2e_duel import CACHE, Engine
from gguf_model import MODELS, VOCABULARY

DECODED = 64


class Ours(Engine):
    """The file opened by coterie in a process of its own, which answers as e2e_engines.py does."""

    def __init__(self, path: Path, dense: str) -> None:
        self.name = f"coterie, dense={dense}"
        command = [sys.executable, __file__, "--worker", str(path), "--dense", dense]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.answer()


def work(path: str, dense: str) -> None:
    from e2e_engines import transformers_model

    import coterie

    run = transformers_model(lambda: coterie.from_pretrained(path, dense=None if dense == "none" else dense))
    draw = random.Random(0)

    def figures(prompt: int, decoded: int) -> dict[str, float]:
        prefill, decode = run([draw.randrange(VOCABULARY) for _ in range(prompt)], decoded)
        return {"prefill": prefill, "decode": decode}

    figures(32, 4)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(figures(*map(int, line.split()))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", default="own", help="of linear layers: own, int8, none ..., or several")
    parser.add_argument("--model", choices=MODELS, default="qwen3-30b")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked.worker, asked.dense)
        return
    path = CACHE / "e2e" / f"{asked.model}-q4_k_m.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        MODELS[asked.model](path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    engines = [Engine(f"llama:{path.stem}", path.parent), *(Ours(path, dense) for dense in asked.dense.split(","))]
    rounds = [[engine.time(asked.prompt, DECODED) for engine in engines] for _ in range(asked.rounds)]
    for number, engine in enumerate(engines):
        said = [engine.name]
        for what in ("prefill", "decode"):
            rate = statistics.median(turn[number][what] for turn in rounds)
            ratios = [turn[number][what] / turn[0][what] for turn in rounds]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            said.append(f"{what} {rate:.1f} tokens/s, {ratio} times llama.cpp's")
        print("; ".join(said), flush=True)


if __name__ == "__main__":
    main()
