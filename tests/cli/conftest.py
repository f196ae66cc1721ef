"""Runs the `coterie` command in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from coterie import cli
from coterie.cli.console import console, errors


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def coterie(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """coterie("plan", path) -> exit code, stdout, stderr of that command."""
    for each in (console, errors):
        monkeypatch.setattr(each, "_width", 200)

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["coterie", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Ran(ended.value.code or 0, out, err)

    return run
