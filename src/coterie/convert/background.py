"""Work done beside the caller's own, in a thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec

P = ParamSpec("P")


class Background:
    """Runs calls one after the other in a thread of its own, at most one of them unfinished. A context manager.

    What a call raises is raised by the next `run`, or by leaving the block. Whichever way the block is left, no call is
    running afterwards.
    """

    def __enter__(self) -> Background:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="coterie-background")
        self._last: Future[None] | None = None
        return self

    def run(self, call: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Waits until the last call is done, then starts this one and returns."""
        self._finish()
        self._last = self._pool.submit(call, *args, **kwargs)

    def _finish(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def __exit__(self, kind: type[BaseException] | None, value: object, traceback: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._pool.shutdown()
