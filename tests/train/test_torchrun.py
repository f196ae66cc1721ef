"""coterie sft under torchrun: two processes train what one trains on twice the batch; the first one writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from coterie.train.example import DATA

# coterie sft, and at the very end of each process the threads of its process group: one that is still there when the
# interpreter ends may abort the process.
PROGRAM = """
import atexit, pathlib
def names():
    return [task.read_text().strip() for task in pathlib.Path("/proc/self/task").glob("*/comm")]
atexit.register(lambda: print("threads of gloo at exit:", sum("gloo" in name for name in names())))
import torch
from coterie.cli import main
main()
"""


def losses(folder: Path, name: str = "loss") -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[name] for row in rows if name in row}


def test_two_processes_train_like_one(write, configure, train, tmp_path, float32_products):
    few = tmp_path / "few.jsonl"  # a number that neither processes nor batches divide
    few.write_text("\n".join((DATA / "heldout.jsonl").read_text().splitlines()[:5]))
    evaluation = {"test_datasets": [{"path": str(few)}], "eval_steps": 4}
    common = {"bf16": False, "save_steps": 2, "profiler_steps": 1, **evaluation}
    pair = tmp_path / "pair"
    file = write(**common, output_dir=str(pair))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "--no-python", sys.executable, "-c", PROGRAM, "sft", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("threads of gloo at exit: 0\n") == 2, done.stdout
    assert done.stdout.count("trained") == 1 and done.stderr.count("step 3/4") == 1
    files = {path.name for path in pair.iterdir()}
    assert {"adapter_model.safetensors", "metrics.jsonl", "loss.png", "trace.json", "checkpoint-2"} <= files
    assert (pair / "checkpoint-2" / "rng_state_1.pth").exists()

    train(configure(**common, output_dir=str(tmp_path / "one"), gradient_accumulation_steps=2))
    train(configure(**common, output_dir=str(tmp_path / "double"), micro_batch_size=4))
    assert list(losses(pair)) == [1, 2, 3, 4]
    assert losses(pair) == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    assert losses(pair) == pytest.approx(losses(tmp_path / "double"), rel=1e-3)
    assert losses(pair, "eval_loss") == pytest.approx(losses(tmp_path / "one", "eval_loss"), rel=1e-5)
    adapters = [load_file(folder / "adapter_model.safetensors") for folder in (pair, tmp_path / "one")]
    for name, found in adapters[0].items():
        torch.testing.assert_close(found, adapters[1][name], rtol=1e-5, atol=1e-7)
