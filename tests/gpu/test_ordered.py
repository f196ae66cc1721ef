"""Calls of the engine by a GPU's stream, which is pretended here: it calls the C functions that a real one would."""

from __future__ import annotations

import ctypes
import gc
import weakref

import pytest
import torch
from engine_cases import FORMATS, Batch, name_of, packed
from gradient_cases import random_lora

from coterie import ExpertLora, Experts, _native
from coterie.errors import ArgumentError
from coterie.gpu import driver, ordered

SIZES = (4, 128, 256)
X, IDS, WEIGHTS = Batch(9, 2).tensors(SIZES)
Calls = _native.StreamCall


class Stream:
    """idle: calls what is launched at once, so that what is queued behind finds the output. captures: for a graph."""

    def __init__(self, monkeypatch, idle=True, captures=False):
        self.idle, self.function, self.arguments = idle, Calls.replayed if captures else Calls.once, []
        monkeypatch.setattr(driver, "launch", self.launch)
        monkeypatch.setattr(driver, "pinned", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))

    def launch(self, call, device):
        call.launch()
        self.arguments.append(call.argument)
        if self.idle:
            self.call(self.function, [call.argument])

    def call(self, function, arguments=None):
        for argument in arguments or self.arguments:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)


@pytest.fixture
def small():
    """Experts that nothing else holds, and what they hold."""
    experts = Experts.pack(*(torch.randn(4, *size) for size in ((256, 128), (256, 128), (128, 256))), format="int8")
    return [experts], weakref.ref(experts._layer)


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_bits_of_the_call(spec, dtype, monkeypatch):
    Stream(monkeypatch)
    experts, x = packed(spec, SIZES), X.to(dtype)
    found = ordered.forward(experts, x, IDS.int(), WEIGHTS.bfloat16(), None, None)
    assert found.dtype == dtype and torch.equal(found, experts(x, IDS, WEIGHTS.bfloat16().float()))
    turned = [t.T.contiguous().T for t in (x, IDS, WEIGHTS)]
    assert torch.equal(ordered.forward(experts, *turned, None, None), experts(x, IDS, WEIGHTS))


def test_adapters(monkeypatch):
    Stream(monkeypatch)
    experts = packed(FORMATS[6], SIZES)
    lora = ExpertLora(**random_lora(SIZES, 4, torch.float32), scaling=2.0)
    assert torch.equal(ordered.forward(experts, X, IDS, WEIGHTS, lora, None), experts(X, IDS, WEIGHTS, lora))


def test_what_fails_is_raised_by_a_later_call(monkeypatch):
    Stream(monkeypatch)
    experts = packed(FORMATS[0], SIZES)
    for dtype in (torch.bfloat16, torch.float32):
        found = ordered.forward(experts, X.to(dtype), IDS * 0 + 4, WEIGHTS, None, None)
        assert found.isnan().all()
        with pytest.raises(ArgumentError, match=r"an earlier call .* expert id 4 of token 0 is out of range"):
            ordered.forward(experts, X, IDS, WEIGHTS, None, None)
        assert not ordered.forward(experts, X, IDS, WEIGHTS, None, None).isnan().any()


def test_what_a_stream_has_yet_to_call_stays(small, monkeypatch):
    experts, layer = small
    stream = Stream(monkeypatch, idle=False)
    ordered.forward(experts.pop(), X, IDS, WEIGHTS, None, None)
    gc.collect()
    ordered.check()
    assert layer() is not None
    stream.call(Calls.once)
    ordered.check()
    gc.collect()
    assert layer() is None


def test_what_a_graph_replays_stays_as_long_as_the_graph(small, monkeypatch):
    experts, layer = small
    stream = Stream(monkeypatch, captures=True)
    ordered.forward(experts.pop(), X, IDS, WEIGHTS, None, None)
    for _ in range(2):
        gc.collect()
        stream.call(Calls.replayed)
        ordered.check()
        assert layer() is not None
    stream.call(Calls.released)
    ordered.check()
    gc.collect()
    assert layer() is None


def test_for_few_tokens_on_a_gpu():
    gpu = torch.device("cuda", 0)
    assert ordered.possible(gpu, 1) and ordered.possible(gpu, ordered.FEW_TOKENS)
    assert not any(ordered.possible(*case) for case in ((gpu, 0), (gpu, 65), (torch.device("cpu"), 1)))
