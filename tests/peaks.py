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


# The least is taken: what the allocator happens to hold is some megabytes, what grows is there each time.
REPEATS = 3


def growth(tool: Callable[[str, str], object]) -> int:
    """Bytes by which `tool("large", out)` takes more, at its highest, than `tool("small", out)`; `out` is another name
    each time."""
    tool("small", "first")  # imports

    def least(size: str) -> int:
        return min(peak_rise(lambda n=n: tool(size, f"{size}{n}")) for n in range(REPEATS))

    return least("large") - least("small")
