"""Tests of a pretended GPU run where there is none, those of a real one where there is one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils import backend_registration

sys.path.append(str(Path(__file__).parents[1] / "hf"))  # its tiny models

# Before the first backward pass of the process: autograd counts the devices then, once.
IN_PYTHON = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
if IN_PYTHON and not torch.cuda.is_available():
    import pretend as pretended


@pytest.fixture
def pretend() -> Iterator[ModuleType]:
    """The pretended device; what was copied is forgotten."""
    if torch.cuda.is_available():
        pytest.skip("a real GPU is tested instead")
    if not IN_PYTHON:
        pytest.skip("this torch takes no backends in Python")
    pretended.copied.clear()
    with pretended.Device():
        yield pretended
