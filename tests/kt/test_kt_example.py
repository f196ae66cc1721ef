"""examples/kt_wrapper.py with coterie and, where it is installed and runs, with kt-kernel."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "kt_wrapper.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("kt_wrapper", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_with_coterie(example):
    found = example.errors("coterie.kt", "AMXBF16_SFT")
    assert len(found) == 9 and max(found.values()) < 0.01, found


@pytest.mark.parametrize("method", ("AMXBF16_SFT", "AMXINT4_SFT"))
def test_the_example_is_no_less_exact_than_with_kt_kernel(example, method):
    pytest.importorskip("kt_kernel")
    ours, theirs = example.errors("coterie.kt", method), example.errors("kt_kernel", method)
    assert all(ours[name] <= theirs[name] for name in theirs), (ours, theirs)
