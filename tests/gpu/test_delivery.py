"""Pieces on their way to a GPU: in which order buffers, copies and computing wait for each other, written down."""

from __future__ import annotations

import contextlib

import pytest
import torch

from coterie.gpu import delivery

EMPTY = torch.empty
PIECES = [[torch.full((8,), 10 * i + e, dtype=torch.uint8) for e in range(1 + i % 2)] for i in range(5)]


class Stream:
    """One that writes down what it is told."""

    def __init__(self, name, log):
        self.name, self.log, self.events = name, log, 0

    def record_event(self):
        self.events += 1
        return Event(f"{self.name} {self.events}", self.log)

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, stream):
        self.log.append(f"{self.name} waits for {stream.name}")


class Event:
    def __init__(self, name, log):
        self.name, self.log = name, log

    def synchronize(self):
        self.log.append(f"CPU waits for {self.name}")


@pytest.fixture
def log(monkeypatch):
    """What happens, with streams and pinned memory that are made up: copies are done at once."""
    found: list[str] = []
    computing, copying = Stream("computing", found), Stream("copying", found)

    def stream(one):
        found.append(f"{one.name} copies")
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: computing)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(delivery, "_copying", lambda device: copying)
    monkeypatch.setattr(
        torch, "empty", lambda *size, device=None, pin_memory=False, **more: found.append(
            "pinned" if pin_memory else str(device)) or EMPTY(*size, **more)
    )  # fmt: skip
    return found


def test_who_waits_for_whom(log):
    """Two buffers on each side. The CPU writes one again when its copy is done, a copy when the piece there is used."""
    arriving = delivery.deliver(torch.device("cuda", 0), PIECES, lambda data: log.append("use") or data.clone())
    found = []
    for data in arriving:
        found.append(data)
        log.append("computes")
    assert [data.tolist() for data in found] == [torch.stack(piece).tolist() for piece in PIECES]
    assert log[:4] == ["pinned", "pinned", "cuda:0", "cuda:0"]
    expected = []
    for i in range(5):
        expected += [f"CPU waits for copying {i - 1}"] if i > 1 else []
        expected += [f"copying waits for computing {i if i > 1 else 1}", "copying copies"]
        expected += ["computing waits for copying", "use", "computes"]
    assert log[4:] == [*expected, "computing waits for copying"]


@pytest.mark.parametrize("where", ["use", "consumer", "copy"])
def test_copies_under_way_are_waited_for_after_an_error(where, log):
    def use(data):
        if where == "use":
            raise MemoryError(where)
        return data.clone()

    pieces = [*PIECES[:1], [torch.zeros(9, dtype=torch.uint8)] * 2] if where == "copy" else PIECES
    arriving = delivery.deliver(torch.device("cuda", 0), pieces, use)
    with pytest.raises((MemoryError, RuntimeError)), contextlib.closing(arriving):
        for _ in arriving:
            if where == "consumer":
                raise MemoryError(where)
    assert log[-1] == "computing waits for copying" and log.count("use") <= 1
    assert next(arriving, None) is None


def test_neighbours_in_memory_are_copied_together():
    pages = torch.arange(48, dtype=torch.uint8)
    e = pages.split(8)
    others = torch.arange(100, 108, dtype=torch.uint8)
    piece = [e[0], e[1], e[3], e[4], e[5], others, e[2], e[1]]
    found = list(delivery.runs(piece))
    assert [len(run) for run in found] == [2, 3, 1, 1, 1]
    assert torch.equal(torch.cat(found), torch.stack(piece))


def test_nothing_to_send(log):
    assert list(delivery.deliver(torch.device("cuda", 0), [], lambda data: data)) == [] and not log


def test_other_devices():
    arriving = delivery.deliver(torch.device("cpu"), PIECES, lambda data: data.sum().item())
    assert list(arriving) == [sum(int(expert.sum()) for expert in piece) for piece in PIECES]
