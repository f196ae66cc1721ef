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


module: ModuleType | None = None
if not torch.cuda.is_available() and hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    import pretend as module  # before any test: autograd counts the devices when it first runs


@pytest.fixture
def pretend() -> Iterator[ModuleType]:
    """The pretended device; what was copied is forgotten."""
    if module is None:
        pytest.skip("a real GPU is tested instead, or this torch takes no backends in Python")
    module.copied.clear()
    with module.Device():
        yield module
