"""The measure of memory itself, on work whose memory is known."""

from __future__ import annotations

import torch

from coterie.bench.memory import peak_rise, resident

SIZE = 64 << 20
SLACK = SIZE // 64  # the kernel counts pages per CPU and adds them up only now and then


def test_memory_that_was_given_back_is_in_the_peak():
    before = resident()
    assert SIZE - SLACK <= peak_rise(lambda: torch.ones(SIZE // 4).sum()) < 1.25 * SIZE
    assert resident() < before + SIZE / 4


def test_a_peak_of_before_is_not_counted():
    torch.ones(SIZE // 4).sum()
    assert peak_rise(lambda: None) < SIZE / 4
