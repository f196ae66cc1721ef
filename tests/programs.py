"""Programs of their own, for what may hang or crash: a small layer of experts, a batch and what it answers."""

from __future__ import annotations

import subprocess
import sys
import textwrap

SETUP = """
import os, sys, threading, time
import torch
import coterie
torch.set_num_threads(1)
coterie.cpu.set_threads(3)
experts = coterie.Experts.pack(torch.randn(4, 64, 96), torch.randn(4, 64, 96), torch.randn(4, 96, 64), format="int4")
x, ids, weights = torch.randn(9, 96), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
expected = experts(x, ids, weights)
"""


def program(script: str, first: str = "") -> list[str]:
    """The command line; `first` is run before coterie is imported."""
    code = f"{first}\n{SETUP}{textwrap.dedent(script)}"
    return [sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", code]


def run(script: str, first: str = "") -> str:
    """What such a program prints; it must end well, and soon."""
    done = subprocess.run(program(script, first), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
    return done.stdout
