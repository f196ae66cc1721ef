"""What the operators find by a handle: alive as long as it is needed, and never another process's."""

from __future__ import annotations

import copy
import gc
import weakref

import forks
import pytest
import torch
from engine_cases import Batch, dense
from gradient_cases import random_batch
from torch import nn

from coterie import Experts
from coterie.errors import ArgumentError

SIZES = (4, 64, 96)


class Block(nn.Module):
    def __init__(self, seed: int = 0, kind: str = "int8") -> None:
        super().__init__()
        gate, up, down = (w + 0.01 * seed for w in dense(SIZES))
        self.experts = Experts.pack(gate, up, down, format=kind)

    def forward(self, x, ids, weights):
        return self.experts(x * 1.0, ids, weights)


@pytest.mark.parametrize("compiled", [False, True])
def test_experts_live_until_the_backward_pass(compiled):
    x, ids, weights, grad = random_batch(SIZES, 2, 9)

    def backward(drop: bool):
        block, given = Block(), x.float().requires_grad_()
        call = torch.compile(block, backend="aot_eager", fullgraph=True) if compiled else block
        out = call(given, ids, weights)
        layer = weakref.ref(block.experts._layer)
        if drop:
            del block, call
            torch.compiler.reset()
            gc.collect()
            assert layer() is not None
        out.backward(grad.float())
        return given.grad, layer

    torch.compiler.reset()
    expected, _ = backward(drop=False)
    torch.compiler.reset()
    found, layer = backward(drop=True)
    assert torch.equal(found, expected)
    gc.collect()
    assert layer() is None


def test_nothing_else_keeps_experts_alive():
    experts = Experts.pack(*dense(SIZES))
    experts(*Batch(3, 2).tensors(SIZES))
    layer, weight = weakref.ref(experts._layer), weakref.ref(experts._weights[0])
    gc.collect()
    gc.disable()
    try:
        del experts
        assert layer() is None and weight() is None
    finally:
        gc.enable()


def test_a_view_of_the_handle_keeps_the_weights():
    experts, inputs = Experts.pack(*dense(SIZES)), Batch(3, 2).tensors(SIZES)
    expected, alias = experts(*inputs), experts._handle.detach().view(1, 1)[0]
    del experts
    gc.collect()
    found = torch.ops.coterie.experts_forward(*inputs, alias, *[None] * 6, [1.0] * 3, False)
    assert torch.equal(found, expected)


def test_copies_share_the_handle():
    block, inputs = Block(), Batch(3, 2).tensors(SIZES)
    twin = copy.deepcopy(block)
    assert twin.experts._layer is block.experts._layer
    expected = block(*inputs)
    del block
    gc.collect()
    assert torch.equal(twin(*inputs), expected)


@pytest.mark.parametrize("operator", ["forward", "train", "backward"])
def test_unknown_handles(operator):
    x, ids, weights = Batch(3, 2).tensors(SIZES)
    kept = torch.zeros(6, 96, dtype=torch.bfloat16)
    none, stale = [None] * 6, Experts.pack(*dense(SIZES))._handle.clone()
    gc.collect()
    calls = {
        "forward": lambda h: torch.ops.coterie.experts_forward(x, ids, weights, h, *none, [1.0] * 3, False),
        "train": lambda h: torch.ops.coterie.experts_train(x, ids, weights, h, *none, [1.0] * 3, False, 96, True),
        "backward": lambda h: torch.ops.coterie.experts_backward(
            x, x, ids, weights, kept, kept, h, *none, [1.0] * 3, False, [False] * 6
        ),
    }
    for handle in (torch.tensor(0), torch.tensor([1]), stale):
        with pytest.raises(ArgumentError, match="packed weights that are not in this process"):
            calls[operator](handle)


LOAD = """
import sys, torch
from coterie import Experts
from coterie.errors import ArgumentError
inputs = torch.load(sys.argv[2])
others = [Experts.pack(torch.randn(4, 96, 64), torch.randn(4, 96, 64), torch.randn(4, 64, 96)) for _ in range(3)]
graph = torch.export.load(sys.argv[1]).module()
try:
    graph(*inputs)
except ArgumentError as error:
    print(error)
"""


def test_an_exported_graph_elsewhere_is_an_error(tmp_path):
    block, inputs = Block(), Batch(5, 2).tensors(SIZES)
    exported = torch.export.export(block, inputs)
    assert torch.equal(exported.module()(*inputs), block(*inputs))
    torch.export.save(exported, tmp_path / "graph.pt2")
    torch.save(inputs, tmp_path / "inputs.pt")
    done = forks.run(LOAD, tmp_path / "graph.pt2", tmp_path / "inputs.pt")
    assert "packed weights that are not in this process" in done.stdout, done.stderr


def test_layers_share_a_compiled_graph():
    inputs = Batch(5, 2).tensors(SIZES)
    blocks = [Block(seed) for seed in range(4)]
    expected = [block(*inputs) for block in blocks]
    torch.compiler.reset()
    for block in blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [block(*inputs) for block in blocks]
        for block in blocks:
            block.experts.adapt()  # and neither does another arithmetic need another graph
        again = [block(*inputs) for block in blocks]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b._orig_mod(*inputs) if hasattr(b, "_orig_mod") else b.forward(*inputs))
               for a, b in zip(again, blocks, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(again, found, strict=True))


def test_biases_may_be_changed():
    experts, inputs = Experts.pack(*dense(SIZES), format="bf16"), Batch(3, 2).tensors(SIZES)
    before = experts(*inputs)
    bias = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    experts.set_biases(down=bias)
    _, ids, weights = inputs
    added = (bias[ids] * weights[..., None]).sum(1)
    torch.testing.assert_close(experts(*inputs), before + added)
    experts.set_biases()
    assert torch.equal(experts(*inputs), before)


def test_experts_without_all_their_weights_are_not_computed():
    experts = Experts(*SIZES, Experts.pack(*dense(SIZES)).spec)
    with pytest.raises(ArgumentError, match="do not have all their weights yet"):
        experts(*Batch(3, 2).tensors(SIZES))


