"""PackedWeight: a parameter with shape, dtype and values, without storage."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import coterie
from coterie.errors import ArgumentError
from coterie.hf.layout import Layout
from coterie.hf.packed import PackedModule
from coterie.hf.weight import PackedWeight

E, H, I = 3, 64, 32  # noqa: E741


@pytest.fixture(params=[False, True], ids=["plain", "transposed"])
def packed(request) -> PackedModule:
    torch.manual_seed(0)
    experts = coterie.Experts.pack(
        torch.randn(E, I, H),
        torch.randn(E, I, H),
        torch.randn(E, H, I),
        format="int8",
        gate_bias=torch.randn(E, I),
        up_bias=torch.randn(E, I),
        down_bias=torch.randn(E, H),
    )
    layout = Layout(E, H, I, experts.activation, True, True, request.param, not request.param)
    return PackedModule(experts, layout)


@pytest.fixture
def weight(packed) -> nn.Parameter:
    return nn.Parameter(PackedWeight(packed, "gate_up_proj", torch.bfloat16), requires_grad=False)


def dense(packed: PackedModule, name: str = "gate_up_proj") -> torch.Tensor:
    gate, up, down = packed.experts.dequantize()
    if name == "down_proj":
        whole = down
    elif packed.layout.is_concatenated:
        whole = torch.cat([gate, up], dim=1)
    else:
        whole = torch.stack([gate, up], dim=2).flatten(1, 2)
    return whole.transpose(1, 2) if packed.layout.is_transposed else whole


def test_is_a_parameter(weight, packed):
    assert isinstance(weight, nn.Parameter) and isinstance(weight, PackedWeight)
    assert tuple(weight.shape) == packed.layout.shape("gate_up_proj")
    assert (weight.dtype, weight.device.type, weight.requires_grad) == (torch.bfloat16, "cpu", False)
    assert weight.numel() == E * 2 * I * H
    assert "int8" in repr(weight)


def test_values(weight, packed):
    expected = dense(packed).to(torch.bfloat16)
    assert torch.equal(weight.dense(), expected)
    assert torch.equal(weight[1], expected[1])
    assert torch.equal(weight[-1], expected[-1])
    assert torch.equal(weight[torch.tensor([2, 0])], expected[[2, 0]])
    assert torch.equal(weight + 0, expected)
    assert torch.equal(weight.transpose(1, 2), expected.transpose(1, 2))
    down = PackedWeight(packed, "down_proj", torch.float32)
    assert torch.equal(down.dense(), dense(packed, "down_proj"))
    biases = packed.experts.biases()
    bias = PackedWeight(packed, "gate_up_proj_bias", torch.float32)
    halves = (bias[:, :I], bias[:, I:]) if packed.layout.is_concatenated else (bias[:, ::2], bias[:, 1::2])
    assert torch.equal(halves[0], biases["gate"]) and torch.equal(halves[1], biases["up"])


def test_casts_share_the_bytes(weight):
    for other in (weight.to(torch.float32), weight.detach(), weight.clone(), weight.data, weight.cpu()):
        assert isinstance(other, PackedWeight)
        assert other.packed is weight.packed
    assert weight.to(torch.float32).dtype == torch.float32


def test_deepcopy(weight):
    twin = copy.deepcopy(weight)
    assert isinstance(twin, nn.Parameter) and twin.packed is weight.packed


def test_empty_like_reads_nothing(weight, monkeypatch):
    monkeypatch.setattr(PackedWeight, "dense", lambda self: 1 / 0)
    assert type(torch.empty_like(weight)) is torch.Tensor
    assert not torch.zeros_like(weight, dtype=torch.float32).any()
    assert torch.ones_like(weight).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "write", [torch.Tensor.zero_, torch.Tensor.normal_, lambda w: w.add_(1), lambda w: w.copy_(torch.ones(1))]
)
def test_cannot_be_written(weight, write):
    with torch.no_grad(), pytest.raises(ArgumentError, match="frozen"):
        write(weight)


def test_copy_of_itself_is_nothing(weight):
    with torch.no_grad():
        weight.copy_(weight.detach())


def test_cannot_be_pickled(weight):
    with pytest.raises(ArgumentError, match="save_pretrained"):
        pickle.dumps(weight)
