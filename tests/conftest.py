"""Modules beside this file are importable from every test."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():  # Triton's kernels then run in its interpreter, which is chosen when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

from instruction_sets import FLOAT32, ISAS

import coterie


def pytest_collection_finish() -> None:
    """What was imported by now lives to the end: a collection of garbage need not go through all of it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set this CPU has, and AMX with its tiles emulated, one after the other."""
    before = coterie.cpu.current_isa()
    coterie.cpu.use_isa(request.param)
    yield request.param
    coterie.cpu.use_isa(before)


@pytest.fixture
def each_isa() -> Iterator[Iterator[str]]:
    """The same within one test, whose truth is dear: ``for isa in each_isa``."""

    def switch() -> Iterator[str]:
        for name in ISAS:
            coterie.cpu.use_isa(name)
            yield name

    before = coterie.cpu.current_isa()
    yield switch()
    coterie.cpu.use_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of threads back."""
    before = coterie.cpu.threads()
    yield
    coterie.cpu.set_threads(before)


@pytest.fixture
def float32_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels of this and of started processes that keep activations in float32."""
    before = coterie.cpu.current_isa()
    coterie.cpu.use_isa(FLOAT32)
    monkeypatch.setenv("COTERIE_ISA", FLOAT32)
    yield
    coterie.cpu.use_isa(before)
