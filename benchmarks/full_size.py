"""A model of Qwen3-30B-A3B's full size, random weights: what loading, prefill, decoding and a training step take.

python benchmarks/full_size.py FOLDER --output full_size.json                        61 GB of disk, 24 GB of RAM
python benchmarks/full_size.py FOLDER --layers 4 --only load,decode                  a slice of it
python benchmarks/full_size.py FOLDER --tiny                                         the script itself, anywhere

The checkpoint is made in FOLDER first, in bf16, where it is not there yet. Each piece of work loads the model in a
process of its own, so that memory holds one model, and its peak is its own. Peaks are those of the whole process.
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import coterie  # before torch, here and in the processes that import this file
from coterie import cpu, versions
from coterie.bench.checkpoint import remove_random_checkpoint, write_random_checkpoint
from coterie.bench.full_size import Figures, FullSize, Work
from coterie.bench.process import Remote
from coterie.bench.random_model import qwen3_30b
from coterie.cli.console import console, errors, significant, size, table
from coterie.errors import CoterieError

TINY = {
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_WORK = Work(prompt=16, decoded=4, sequences=3, trained=16)
SECTIONS = ("load", "prefill", "decode", "together", "train")


def main() -> None:
    given = read_options()
    config = qwen3_30b(given.layers, 151936)
    work = Work()
    if given.tiny:
        config.update(TINY)
        work = TINY_WORK
    try:
        with errors.status(f"making the checkpoint in {given.folder}"):
            nbytes = write_random_checkpoint(given.folder, config)
        found = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "cpu": asdict(cpu.info()),
            "versions": versions.installed(),
            "config": config.to_diff_dict(),
            "checkpoint_nbytes": nbytes,
            "experts": given.experts,
            "dense": given.dense,
            "work": asdict(work),
            "figures": {},
        }
        measured = {}
        for name in given.only:
            with errors.status(f"{name}: loading and measuring"):
                try:
                    with Remote(partial(FullSize, given.folder, given.experts, given.dense, work)) as model:
                        measured[name] = model.call(name)
                    found["figures"][name] = asdict(measured[name])
                except CoterieError as error:
                    found["figures"][name] = {"error": str(error)}
                    errors.print(f"{name}: {error}", markup=False, highlight=False)
            if given.output:
                given.output.write_text(json.dumps(found, indent=1) + "\n")
        show(config.num_hidden_layers, given, work, nbytes, measured)
    finally:
        if not given.keep:
            remove_random_checkpoint(given.folder, config)


def read_options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--layers", type=int, default=48)
    options.add_argument("--experts", default="int4")
    options.add_argument("--dense", default="int4", help="format of the linear layers outside the experts, or none")
    options.add_argument("--only", default=",".join(SECTIONS), help="some of: %(default)s")
    options.add_argument("--tiny", action="store_true", help="two small layers, few tokens")
    options.add_argument("--keep", action=argparse.BooleanOptionalAction, default=True, help="the checkpoint")
    options.add_argument("--output", type=Path, help="a JSON file of all figures")
    given = options.parse_args()
    given.only = given.only.split(",")
    if unknown := set(given.only) - set(SECTIONS):
        options.error(f"--only: {', '.join(sorted(unknown))}: expected some of {', '.join(SECTIONS)}")
    given.dense = None if given.dense == "none" else given.dense
    return given


def show(layers: int, given: argparse.Namespace, work: Work, nbytes: int, measured: dict[str, Figures]) -> None:
    """The table, and what it was measured with."""
    title = f"{layers} layers of Qwen3-30B-A3B, {size(nbytes)} in bf16: experts {given.experts}, dense {given.dense}"
    names = {
        "load": "load and pack",
        "prefill": f"prefill of {work.prompt} tokens",
        "decode": f"decode of {work.decoded} tokens",
        "together": f"decode of {work.sequences} sequences",
        "train": f"step of {work.trained} tokens, LoRA",
    }
    report = table(title if not given.tiny else "tiny", "", "seconds", "tokens/s", "times one", "peak RAM")
    for name, figures in measured.items():
        report.add_row(
            names[name],
            significant(figures.seconds),
            significant(figures.tokens_per_second) if figures.tokens else "",
            significant(figures.ratio) if figures.ratio else "",
            size(figures.peak),
        )
    console.print(report)
    info, found = cpu.info(), versions.installed()
    console.print(
        f"{info.model}, {info.isa} kernels, {info.threads} threads; coterie {coterie.__version__}, torch "
        f"{found['torch']}, transformers {found['transformers']}, peft {found['peft']}, python {found['python']}",
        style="dim",
        highlight=False,
    )


if __name__ == "__main__":
    main()
