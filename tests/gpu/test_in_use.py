"""What `coterie chat` and `coterie serve` say of a model on a device, at the start."""

from __future__ import annotations

import re

import pytest
import torch

from coterie import tiny
from coterie.cli.in_use import memory_in_use, where_it_is
from coterie.cli.model_options import read_gpu_experts
from coterie.errors import ArgumentError
from coterie.serve.opening import open_model

RAM = r"[\d.]+ [MG]B of RAM"


@pytest.mark.parametrize(
    ("gpu_experts", "there"),
    [
        (None, "all but the experts"),
        ("all", "all, experts too"),
        ("4", "all but the experts, and 4 of each layer's 16"),
        ("0.5", "all but the experts, and 8 of each layer's 16"),
        ("auto", "all, experts too"),
    ],
)
def test_where_a_model_is(gpu_experts, there, pretend, monkeypatch):
    monkeypatch.setenv("COTERIE_VRAM", "64GB")
    model, _ = open_model(
        str(tiny.PATH), {}, device=pretend.NAME, gpu_experts=read_gpu_experts(gpu_experts, pretend.NAME)
    )
    assert re.fullmatch(rf"on pretend:0: {there}; {RAM}", where_it_is(model))


def test_layers_that_differ(pretend):
    model, _ = open_model(
        str(tiny.PATH), {}, device=pretend.NAME, gpu_experts=[[True] * 3 + [False] * 13, *[[False] * 16] * 3]
    )
    assert "all but the experts, and 0 of each layer's 16 or 3 of each layer's 16; " in where_it_is(model)


def test_a_model_in_ram():
    model, _ = open_model(str(tiny.PATH), {})
    assert where_it_is(model) is None


def test_memory_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3_400_000_000)
    assert re.fullmatch(rf"{RAM}, 3\.4 GB on the GPU", memory_in_use())


def test_experts_without_a_gpu():
    with pytest.raises(ArgumentError, match="add --device cuda"):
        read_gpu_experts("all", "cpu")
