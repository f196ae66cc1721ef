"""What drawing a token takes, by Transformers' processors over a whole vocabulary and among the likeliest:

python benchmarks/sampling.py --vocabulary 151936
"""

from __future__ import annotations

import argparse

import coterie  # before torch  # noqa: F401

# isort: split
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from coterie.bench.timing import take_turns
from coterie.hf.inference.sampling import draw_instead

SETTINGS = {
    "temperature, top k 20, top p 0.95": (TopKLogitsWarper(20), TopPLogitsWarper(0.95)),
    "temperature, top p 0.95": (TopPLogitsWarper(0.95),),
    "temperature": (),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--sequences", type=int, default=1)
    asked = parser.parse_args()
    scores, ids = torch.randn(asked.sequences, asked.vocabulary) * 3, torch.zeros(asked.sequences, 1, dtype=torch.int64)
    for name, warpers in SETTINGS.items():
        processors = LogitsProcessorList([TemperatureLogitsWarper(0.6), *warpers])
        drawn, _ = draw_instead(processors, GenerationConfig(do_sample=True), ids)
        calls = {
            "transformers": lambda _, p=processors: torch.multinomial(p(ids, scores).softmax(-1), 1),
            "here": lambda _, p=drawn: p(ids, scores).argmax(-1),
        }
        turns = take_turns(calls, 0.3, 3)
        theirs, ours = (1e3 * turns.seconds(side) for side in calls)
        print(f"{name}: {theirs:.1f} ms in Transformers, {ours:.1f} here")


if __name__ == "__main__":
    main()
