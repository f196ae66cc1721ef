"""What the kernels are compiled to, for GPUs that are not here: registers that suffice, tensor cores that are used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton")
SHARED = 99 << 10  # bytes of a program, on the GPUs that have the least
MULTIPLY = "together", "gathered_gram"
TENSOR_CORES = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}


def test_machine_code():
    run = subprocess.run(
        [sys.executable, Path(__file__).parent / "machine_code.py"],
        env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert {name.split()[0] for name in found} == {
        "single", "together", "planes", "combine", "dequantise", "activate", "slope", "gathered_gram",
        "rms_norm", "choose", "attend", "join",
    }  # fmt: skip
    for name, taken in found.items():
        assert taken["spilled"] == 0 and taken["shared"] <= SHARED, (name, taken)
        if name.startswith(MULTIPLY):
            assert taken["tensor cores"] == TENSOR_CORES[name.split()[-1]], (name, taken)
        if name.startswith("attend"):  # a few query heads, which are too few rows for the wider ones
            assert taken["tensor cores"] == "mma", (name, taken)
