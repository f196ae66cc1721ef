"""The truth itself, against loops and numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch
from engine_cases import Batch, dense

from coterie import Activation, reference
from coterie.formats import Format


def test_one_token_by_hand():
    one = torch.ones(1, 1, 1)
    found = reference.forward(
        torch.tensor([[2.0]]), torch.tensor([[0]]), torch.tensor([[0.5]]), one, 3 * one, 4 * one
    )
    assert found.item() == pytest.approx(0.5 * 4 * (2 / (1 + math.exp(-2)) * 6))


def test_as_a_loop_over_tokens():
    sizes = (3, 10, 6)
    gate, up, down = dense(sizes)
    x, ids, weights = Batch(5, 2).tensors(sizes)
    ids[2, 0], ids[3] = -1, torch.tensor([1, 1])
    expected = torch.zeros(5, 10)
    for t in range(5):
        for k in range(2):
            if (e := ids[t, k]) >= 0:
                hidden = torch.nn.functional.silu(gate[e] @ x[t]) * (up[e] @ x[t])
                expected[t] += weights[t, k] * (down[e] @ hidden)
    torch.testing.assert_close(reference.forward(x, ids, weights, gate, up, down), expected)


def test_gpt_oss_activation_by_hand():
    activation = Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0)
    gate, up = torch.tensor([9.0, -9.0]), torch.tensor([-8.0, 0.5])
    expected = [7 / (1 + math.exp(-1.702 * 7)) * (-7 + 1), -9 / (1 + math.exp(1.702 * 9)) * 1.5]
    assert reference.act(activation, gate, up).tolist() == pytest.approx(expected)


def test_relu2_without_a_gate():
    assert reference.act(Activation("relu2"), None, torch.tensor([-1.0, 3.0])).tolist() == [0, 9]


def test_quantise_by_hand():
    weight = torch.tensor([[-8.0, 7.0, 3.4, 0.0]])
    assert reference.quantise(weight, Format("int4")).tolist() == [[-8, 7, 3, 0]]
    assert reference.quantise(torch.tensor([[8.0, -7.0, 3.4, 0.0]]), Format("int4")).tolist() == [[8, -7, 3, 0]]
    shifted = Format("int4", zero_point=True)
    assert reference.quantise(torch.tensor([[0.0, 15.0, 7.4, 3.6]]), shifted).tolist() == [[0, 15, 7, 4]]
    assert reference.quantise(torch.tensor([[127.0, -127.0, 0.6]]), Format("int8")).tolist() == [[127, -127, 1]]
    assert not reference.quantise(torch.zeros(2, 4), shifted).any()
