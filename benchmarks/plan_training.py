"""What `coterie plan --train` says beside what a run takes: `coterie sft` on a made model, its peak of resident memory.

python benchmarks/plan_training.py --experts int4 --tokens 1024 [--checkpointing]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from transformers import Qwen3MoeConfig

from coterie import plan, tiny
from coterie.bench.random_model import random_model
from coterie.checkpoints.packed_formats import ModelFormats
from coterie.formats import resolve

SIZES = {
    "vocab_size": 32768,
    "num_hidden_layers": 6,
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
# The peak that getrusage knows would begin with that of the process that started it.
RUN = """
import os
from pathlib import Path
from coterie.bench.memory import status
from coterie.cli import main
try:
    main()
finally:
    Path(os.environ["PEAK"]).write_text(str(status("VmHWM")))
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--experts", default="int4")
    options.add_argument("--tokens", type=int, default=1024)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--checkpointing", action="store_true")
    given = options.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_model(Qwen3MoeConfig(**SIZES), "eager").save_pretrained(folder / "model")
        for file in tiny.PATH.glob("tokenizer*"):
            shutil.copy(file, folder / "model")
        text = "experts and tokens " * given.tokens  # as many tokens at least
        (folder / "data.jsonl").write_text("\n".join(json.dumps({"text": text}) for _ in range(4)))
        config = {
            "base_model": str(folder / "model"),
            "experts": given.experts,
            "datasets": [{"path": str(folder / "data.jsonl"), "type": "completion"}],
            "adapter": "lora",
            "lora_r": given.rank,
            "sequence_len": given.tokens,
            "max_steps": 2,
            "gradient_checkpointing": given.checkpointing,
            "output_dir": str(folder / "output"),
        }
        (folder / "sft.yaml").write_text(yaml.safe_dump(config))

        source = plan.open_source(str(folder / "model"))
        anatomy = plan.inspect(source.config)
        train = plan.train_inspect(source.config, anatomy, given.rank, 1, given.tokens)
        said = plan.train_estimate(anatomy, train, ModelFormats(resolve(given.experts)), ram=0)
        command = [sys.executable, "-c", RUN, "sft", str(folder / "sft.yaml")]
        subprocess.run(command, env=os.environ | {"PEAK": str(folder / "peak")}, check=True)
        peak = int((folder / "peak").read_text())
    planned = said.ram_checkpointed if given.checkpointing else said.ram
    print(train)
    print(f"planned {planned / 1e9:.3f} GB, peak {peak / 1e9:.3f} GB, planned / peak {planned / peak:.2f}")


if __name__ == "__main__":
    main()
