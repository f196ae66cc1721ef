"""Objects in processes of their own: what comes back from them, and what is raised."""

from __future__ import annotations

import os

import pytest

from coterie.bench.process import Remote
from coterie.errors import ArgumentError, DeviceError


class Worker:
    def pid(self) -> int:
        return os.getpid()

    def refuse(self) -> None:
        raise ArgumentError("expected something else")

    def die(self) -> None:
        os._exit(3)


def test_an_object_lives_in_another_process_until_it_is_left():
    with Remote(Worker) as worker:
        assert worker.call("pid") != os.getpid()
        with pytest.raises(ArgumentError, match="expected something else"):
            worker.call("refuse")


def test_a_process_that_ends_is_reported():
    with Remote(Worker) as worker, pytest.raises(DeviceError, match="exit code 3"):
        worker.call("die")
