"""`coterie serve` in a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time

import forks
from openai import OpenAI

KEY = "secret"
SECONDS = 300


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class Serving:
    """A server of the bundled model that is ready to answer; arguments are those of the command."""

    def __init__(self, *arguments: object) -> None:
        self.port = free_port()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `kill`)
        with open(os.devnull) as nothing:
            self.process = forks.Program(
                "from coterie.cli import main; main()",
                "serve",
                *arguments,
                "--port",
                self.port,
                stdin=nothing.fileno(),
                stdout=self._log.fileno(),
                stderr=self._log.fileno(),
                environment=os.environ | {"COTERIE_API_KEY": KEY, "COTERIE_THREADS": "1"},
            )
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0, timeout=SECONDS)
        end = time.monotonic() + SECONDS
        while not self._listens():
            assert self.process.poll() is None and time.monotonic() < end, self.log()
            time.sleep(0.1)

    def _listens(self) -> bool:
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except ConnectionRefusedError:
            return False
        return True

    def log(self) -> str:
        return os.pread(self._log.fileno(), 1 << 20, 0).decode()

    def end(self, number: int = signal.SIGINT) -> int:
        """The exit code after a signal."""
        self.process.send_signal(number)
        return self.process.wait(SECONDS)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()
