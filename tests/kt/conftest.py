"""The factory sets the engine's threads, and deferred sums wait for a layer: neither may reach another test."""

from __future__ import annotations

import pytest

import coterie
from coterie.kt import KTMoEWrapper


@pytest.fixture(autouse=True)
def alone(threads):
    coterie.cpu.set_threads(2)
    yield
    KTMoEWrapper.clear_buffer_cache()
    KTMoEWrapper.set_capture_batch_sizes([])
