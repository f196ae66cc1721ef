"""Threads of Python that compute at once, while another keeps changing the engine's number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

from forks import SECONDS

from coterie import cpu


def compute_at_once(compute: Callable[[int], None], count: int) -> None:
    """Runs `compute(number)` in `count` threads; each must end, however busy the machine."""
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            for threads in (1, 8, 2):
                cpu.set_threads(threads)

    workers = [threading.Thread(target=compute, args=(number,)) for number in range(count)]
    changer = threading.Thread(target=change)
    for thread in (*workers, changer):
        thread.start()
    for thread in workers:
        thread.join(SECONDS)
    done.set()
    changer.join(SECONDS)
    assert not any(thread.is_alive() for thread in (*workers, changer))
