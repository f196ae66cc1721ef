"""How much of a device's memory a model takes, and how many experts have room there."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, dense, name_of

from coterie import Experts
from coterie.errors import ArgumentError, DeviceError
from coterie.formats import Formats
from coterie.gpu import device as devices
from coterie.gpu.device import check_experts, free_nbytes
from coterie.gpu.room import WORK, Room, expert_nbytes, token_nbytes

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("spec", [*FORMATS, Formats(FORMATS[6], FORMATS[1])], ids=name_of)
@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "no gate"])
def test_bytes_of_an_expert(spec, has_gate):
    """They are those that experts take once they are moved."""
    experts = Experts.pack(*dense((3, 256, 512), has_gate), format=spec)
    experts.move("cpu", (0, 2))
    assert expert_nbytes(Formats.of(spec), 256, 512, has_gate) * 2 == experts._placement.resident.nbytes


def room(free: int, **changes) -> Room:
    sizes = {"rest": 1000, "cache": 200, "tokens": 10, "token": 7, "piece": 60, "layers": ((4, 50), (8, 30))}
    return Room(free, **{**sizes, **changes})


BESIDES = 1000 + 200 + WORK + 60 + 10 * 7


@pytest.mark.parametrize(
    ("free", "most", "missing"),
    [
        (0, 0, BESIDES + 80),
        (BESIDES + 79, 0, 1),
        (BESIDES + 80, 1, 0),
        (BESIDES + 4 * 80 - 1, 3, 0),
        (BESIDES + 4 * 80 + 30, 5, 0),  # the first layer has no more than four
        (BESIDES + 10**6, 8, 0),
    ],
)
def test_room(free, most, missing):
    found = room(free)
    assert (found.besides, found.most, found.missing) == (BESIDES, most, missing)
    assert found.experts(5) == 4 * 50 + 5 * 30


def test_bytes_of_a_token():
    """Of Qwen3-30B-A3B: 8 experts of hidden size 2048 and intermediate size 768."""
    assert token_nbytes(8, 2048, 768) == 2 * 8 * (3 * 2048 + 4 * 768)


def test_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 90)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40)
    assert free_nbytes(CUDA) == 750  # what torch's cache holds unused is free
    assert free_nbytes(torch.device("cpu")) is None
    monkeypatch.setenv("COTERIE_VRAM", "24GB")
    assert free_nbytes(CUDA) == 24 * 10**9
    monkeypatch.setenv("COTERIE_VRAM", "much")
    with pytest.raises(ArgumentError, match="expected a size like 64GB"):
        free_nbytes(CUDA)


@pytest.mark.parametrize("found", [(7, 5), (6, 1)])
def test_gpus_without_bfloat16(found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    with pytest.raises(DeviceError, match=rf"compute capability {found[0]}\.{found[1]}, .* needs 8\.0"):
        check_experts(CUDA)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_experts(CUDA)
    monkeypatch.setattr(devices, "capability", lambda device: found)
    with pytest.raises(DeviceError, match="leave gpu_experts out"):
        Experts.pack(*dense((3, 128, 128), True), format="int8").move("cpu")
