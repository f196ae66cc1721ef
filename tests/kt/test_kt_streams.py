"""The CUDA stream that calls are ordered on."""

from __future__ import annotations

import contextlib

import pytest
import torch

from coterie.kt.streams import on_stream

CUDA = torch.device("cuda", 0)


@pytest.fixture
def entered(monkeypatch):
    """What became the current stream."""
    found = []

    @contextlib.contextmanager
    def current(stream):
        found.append(stream)
        yield

    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: ("external", handle, device))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: ("default", device))
    return found


def test_streams_and_their_handles(entered):
    for stream in (7, 0, "a stream"):
        with on_stream(stream, CUDA):
            pass
    assert entered == [("external", 7, CUDA), ("default", CUDA), "a stream"]


def test_no_stream(entered):
    with on_stream(None, CUDA), on_stream(7, torch.device("cpu")):
        pass
    assert entered == []
