"""An object in a process of its own, so that what is measured of its memory is its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from coterie.errors import CoterieError, DeviceError


class Remote:
    """`make()` in a process of its own; `call` calls the methods of what it made. For use in a `with` statement.

    `make`, arguments and results travel by pickle. Errors of coterie are raised here as they were there; raises
    DeviceError if the process ends before it answers.
    """

    def __init__(self, make: Callable[[], object]):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def call(self, method: str, *arguments: Any) -> Any:
        self._connection.send((method, arguments))
        return self._answer()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            error, value = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise DeviceError(
                f"the process that was measured ended with exit code {code}"
                + (": it was killed, perhaps because memory ran out" if code == -9 else "")
            ) from None
        if error is not None:
            raise error
        return value


def _serve(connection: Connection, make: Callable[[], object]) -> None:
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, this process ends and no other
    try:
        made = make()
        connection.send((None, None))
        while True:
            method, arguments = connection.recv()
            connection.send((None, getattr(made, method)(*arguments)))
    except EOFError:
        pass
    except CoterieError as error:
        connection.send((error, None))
