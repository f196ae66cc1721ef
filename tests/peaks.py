"""Whether the memory of a tool grows with the model, by the peak of this process, which starts anew each time.

A process of its own would not do: the peak that getrusage knows begins with that of the process that started it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from coterie.bench.memory import peak_rise

needs_peaks = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs"
)


def growth(tool: Callable[[str, str], object]) -> int:
    """Bytes by which `tool("large", out)` takes more, at its highest, than `tool("small", out)`; `out` is another name
    each time."""
    tool("small", "first")  # imports
    small = peak_rise(lambda: tool("small", "small"))
    return peak_rise(lambda: tool("large", "large")) - small
