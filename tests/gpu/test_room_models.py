"""Models of whose experts some go to a device: as many as have room, or none of what does not go together."""

from __future__ import annotations

import json
import os
import re
import time
import warnings

import pytest
import tiny_models
import torch

import coterie
from coterie import memory
from coterie.errors import ArgumentError, DeviceError, StateError
from coterie.gpu import device as devices
from coterie.gpu.resident import piece_nbytes
from coterie.hf.modules import packed_modules
from coterie.hf.room import find_room
from coterie.hf.weight import PackedWeight


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_moe")
    tiny_models.make("qwen3_moe").save_pretrained(folder)
    return folder


def open_model(folder, pretend, gpu_experts, free=None, monkeypatch=None, **options):
    if free is not None:
        monkeypatch.setenv("COTERIE_VRAM", f"{free}B")
    options = {"dtype": torch.bfloat16, "gpu_experts": gpu_experts, **options}
    return coterie.from_pretrained(folder, "int4", pretend.NAME, **options)


@pytest.fixture
def room(folder, pretend):
    """What the model takes, for caches of 8192 tokens or as many as said."""

    def measured(context=8192):
        model = coterie.from_pretrained(folder, "int4", dtype=torch.bfloat16)
        packed = dict(packed_modules(model))
        layouts = {name: module.layout for name, module in packed.items()}
        formats = {name: module.experts.formats for name, module in packed.items()}
        return find_room(0, piece_nbytes(pretend.DEVICE), context, model, layouts, formats)

    return measured


def moved(model):
    return [len(packed.experts.moved) for _, packed in packed_modules(model)]


def test_what_is_counted(folder, room, pretend):
    """Rest, experts and cache are what they are once they are there."""
    found, model = room(100), open_model(folder, pretend, "all")
    assert found.rest == sum(p.nbytes for p in model.parameters() if not isinstance(p, PackedWeight))
    residents = [packed.experts._placement.resident for _, packed in packed_modules(model)]
    assert found.experts(8) == sum(resident.nbytes for resident in residents)
    ids = torch.zeros(1, 100, dtype=torch.int64).to(pretend.DEVICE)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert found.cache == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    config = model.config
    assert found.token == 2 * config.num_experts_per_tok * (3 * config.hidden_size + 4 * config.moe_intermediate_size)


def test_as_many_as_have_room(folder, room, pretend, monkeypatch):
    found = room()
    free = found.besides + found.experts(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert moved(open_model(folder, pretend, "auto", free, monkeypatch)) == [3, 3]
        assert moved(open_model(folder, pretend, "auto", free - 1, monkeypatch)) == [2, 2]
        assert moved(open_model(folder, pretend, "auto", 10**12, monkeypatch)) == [8, 8]
        shorter = room(4096)
        assert shorter.cache == found.cache // 2
        assert moved(open_model(folder, pretend, "auto", free, monkeypatch, gpu_context=4096))[0] > 3


def test_no_room(folder, room, pretend, monkeypatch):
    found = room()
    short = 5 * 10**6
    free = found.besides + found.experts(1) - short
    with pytest.warns(UserWarning, match=r"no expert has room on pretend:0 .* 8192 tokens .*; all .* in RAM") as told:
        model = open_model(folder, pretend, "auto", free, monkeypatch)
    assert moved(model) == [0, 0] and model.device == pretend.DEVICE
    assert "0.005 GB are missing" in str(told[0].message)


def test_free_memory_that_is_not_known(folder, pretend):
    with pytest.raises(ArgumentError, match="how much memory of pretend:0 is free is not known: COTERIE_VRAM=24GB"):
        open_model(folder, pretend, "auto")
    with pytest.raises(ArgumentError, match="gpu_experts needs a GPU"):
        coterie.from_pretrained(folder, "int4", gpu_experts="auto")
    with pytest.raises(ArgumentError, match="gpu_context: expected a number of tokens, at least 1, found 0"):
        open_model(folder, pretend, "auto", gpu_context=0)


def test_too_much(folder, room, pretend, monkeypatch):
    """Said before anything is packed, with what would have room."""
    found = room()
    big = found.besides + found.experts(2)
    packed = []
    monkeypatch.setattr(memory, "allocate", lambda nbytes, what: packed.append(what))
    with pytest.raises(DeviceError, match=r"need .* GB of memory on pretend:0, .* are free: leave gpu_experts out"):
        open_model(folder, pretend, "all", found.rest + found.experts(8) - 1, monkeypatch)
    with pytest.raises(DeviceError, match=r"all but the experts \(.*\) needs .* are free: use device='cpu'"):
        open_model(folder, pretend, None, found.rest - 1, monkeypatch)
    layers = found.layers
    monkeypatch.setattr("coterie.hf.room.device_nbytes", lambda layout, formats: big)
    with pytest.raises(DeviceError, match=r"chosen by gpu_experts .*: gpu_experts=1 would fit, .* 8192 tokens"):
        open_model(folder, pretend, 3, found.besides + len(layers) * big, monkeypatch)
    assert not packed


def test_a_gpu_without_bfloat16(folder, pretend, monkeypatch):
    monkeypatch.setattr(devices, "capability", lambda device: (7, 5))
    with pytest.raises(DeviceError, match=r"pretend:0 has compute capability 7\.5"):
        open_model(folder, pretend, 2)
    assert moved(open_model(folder, pretend, None)) == [0, 0]


def test_a_forked_process(folder, pretend):
    """It is told so, and does not wait for a device that it cannot use."""
    model = open_model(folder, pretend, 3)
    ids = tiny_models.prompt().to(pretend.DEVICE)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            model(ids)
            said = "computed"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, json.dumps(said).encode())
        os._exit(0)
    os.close(write)
    deadline = time.monotonic() + 60
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            pytest.fail("the forked process hangs")
        time.sleep(0.01)
    with open(read) as said:
        found = json.load(said)
    assert re.match(rf"{StateError.__name__}: the experts are on pretend:0, which a forked process cannot use", found)
