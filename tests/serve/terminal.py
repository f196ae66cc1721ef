"""The `coterie` command on a terminal of its own, typed at and read from like a person does."""

from __future__ import annotations

import os
import pty
import re
import select
import time
from pathlib import Path

import forks

# In its new session the pseudo-terminal becomes the one that Ctrl-C goes through.
PROGRAM = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from coterie.cli import main; main()"
STYLES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SECONDS = 300


class Terminal:
    def __init__(self, *arguments: object) -> None:
        self._here, there = pty.openpty()
        self.process = forks.Program(
            PROGRAM,
            *arguments,
            stdin=there,
            stdout=there,
            stderr=there,
            environment=os.environ | {"TERM": "xterm", "COLUMNS": "200", "COTERIE_THREADS": "1"},
        )
        os.close(there)
        self._read = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._here)

    def until(self, text: str) -> str:
        """What is printed up to `text`, styles included."""
        end = time.monotonic() + SECONDS
        while text not in self._read:
            ready, _, _ = select.select([self._here], [], [], max(0, end - time.monotonic()))
            assert ready, f"waited for {text!r}, found {self._read!r}"
            try:
                piece = os.read(self._here, 4096)
            except OSError:  # the program has ended
                piece = b""
            assert piece, f"waited for {text!r} to the end, found {self._read!r}"
            self._read += piece.decode(errors="replace").replace("\r\n", "\n")
        before, _, self._read = self._read.partition(text)
        return before

    def type(self, line: str) -> None:
        os.write(self._here, line.encode() + b"\n")
        self.until(f"{line}\n")

    def press(self, key: bytes) -> None:
        os.write(self._here, key)

    def until_it_waits(self) -> None:
        """Until the program, having printed what it had to, waits for the next key: a signal that comes before is seen
        with that key only."""
        state, end = Path(f"/proc/{self.process.pid}/stat"), time.monotonic() + SECONDS
        while state.read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, "the program never waits"
            time.sleep(0.01)

    def ask(self, line: str) -> tuple[str, str]:
        """(the answer without styles, what it took) of a line typed at the prompt."""
        self.until("> ")
        self.type(line)
        answer = self.until("\n\x1b[2m[")
        return plain(answer), self.until("]\x1b[0m")

    def end(self) -> int:
        """The exit code of a program that is about to end."""
        return self.process.wait(SECONDS)


def plain(text: str) -> str:
    """`text` without colours and cursor movements."""
    return STYLES.sub("", text)
