"""Programs of their own, for what may hang or crash: a small layer of experts, a batch and what it answers."""

from __future__ import annotations

import textwrap

import forks

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


def program(script: str, first: str = "") -> str:
    """Its code; `first` is run before coterie is imported."""
    return f"{first}\n{SETUP}{textwrap.dedent(script)}"


def run(script: str, first: str = "") -> str:
    """What such a program prints; it must end well, and soon."""
    done = forks.run(program(script, first))
    assert done.returncode == 0, done.stderr
    assert "leaked" not in done.stderr
    return done.stdout
