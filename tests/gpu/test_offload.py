"""Experts in RAM called with tensors on a device: what is copied, and that nothing else differs."""

from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from engine_cases import FORMATS, Batch, dense, dequantized, name_of, packed
from gradient_cases import TOLERANCE, gradients, random_batch, random_lora, relative
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import coterie
from coterie import ExpertLora, Experts, reference
from coterie.errors import ArgumentError
from coterie.gpu import offload

SIZES = (4, 128, 256)
SPECS = [FORMATS[0], FORMATS[1], FORMATS[6]]
X, IDS, WEIGHTS = Batch(9, 2).tensors(SIZES)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_same_bits_as_in_ram(spec, dtype, pretend):
    experts, device = packed(spec, SIZES), pretend.DEVICE
    x = X.to(dtype)
    expected = experts(x, IDS, WEIGHTS)
    found = experts(x.to(device), IDS.to(device), WEIGHTS.to(device))
    assert (found.device, found.dtype) == (device, dtype)
    assert torch.equal(found.cpu(), expected)


def test_inputs_go_once_and_the_result_comes_back(pretend):
    experts, device = packed(FORMATS[0], SIZES), pretend.DEVICE
    inputs = X.bfloat16().to(device), IDS.to(device), WEIGHTS.to(device)
    pretend.copied.clear()
    with torch.no_grad():
        experts(*inputs)
    assert pretend.copied == [
        ("host", (9, 128), torch.bfloat16),
        ("host", (9, 2), torch.int64),
        ("host", (9, 2), torch.float32),
        ("device", (9, 128), torch.bfloat16),
    ]


def test_any_strides_and_no_tokens(pretend):
    experts, device = packed(FORMATS[0], SIZES), pretend.DEVICE
    x, ids, weights = X.T.contiguous().to(device).T, IDS.int().to(device), WEIGHTS.T.contiguous().to(device).T
    assert torch.equal(experts(x, ids, weights).cpu(), experts(X, IDS, WEIGHTS))
    assert experts(x[:0], ids[:0], weights[:0]).shape == (0, 128)


@pytest.mark.parametrize("where", ["ram", "device", "A on the device"])
def test_gradients(where, pretend):
    """Of x, routing weights and LoRA, each where its tensor is; as in RAM to the bit, as in plain torch nearly."""
    experts, device = packed(FORMATS[6], SIZES), pretend.DEVICE
    x, ids, weights, grad = random_batch(SIZES, 2, 12)
    lora = random_lora(SIZES, 4, torch.float32)
    there = {n: t.to(device) if where == "device" or (n[-1] == "a" and where != "ram") else t for n, t in lora.items()}

    expected = gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, lora, grad)
    truth = gradients(
        lambda x, w, lora: reference.forward(x, ids, w, *dequantized(FORMATS[6], SIZES), lora=lora),
        x, weights, lora, grad, torch.float32,
    )  # fmt: skip
    ids = ids.to(device)
    found = gradients(
        lambda x, w, lora: experts(x, ids, w, lora), x.to(device), weights.to(device), there, grad.to(device)
    )
    for name, value in found.items():
        assert value.device == there.get(name, ids).device, name
        assert torch.equal(value.cpu(), expected[name]), name
        assert relative(value.cpu(), truth[name]) < TOLERANCE, name


def test_only_wanted_gradients_are_copied(pretend):
    experts, device = packed(FORMATS[0], SIZES), pretend.DEVICE
    lora = ExpertLora(**{name: t.to(device) for name, t in random_lora(SIZES, 4, torch.float32).items()})
    x = X.to(device).requires_grad_()
    y = experts(x, IDS.to(device), WEIGHTS.to(device), lora)
    grad = torch.ones(X.shape).to(device)
    pretend.copied.clear()
    y.backward(grad)
    assert pretend.copied == [("host", (9, 128), torch.float32), ("device", (9, 128), torch.float32)]


def test_an_a_that_gate_and_up_share_is_copied_once(pretend):
    experts, device = packed(FORMATS[0], SIZES), pretend.DEVICE
    factors = random_lora(SIZES, 4, torch.float32)
    a, gate_b, up_b = factors["gate_a"], factors["gate_b"], factors["up_b"]
    expected = experts(X, IDS, WEIGHTS, ExpertLora(gate_a=a, gate_b=gate_b, up_a=a, up_b=up_b))
    a = a.to(device)
    pretend.copied.clear()
    found = experts(X.to(device), IDS.to(device), WEIGHTS.to(device), ExpertLora(a, gate_b, a, up_b))
    assert torch.equal(found.cpu(), expected)
    assert pretend.copied.count(("host", (4, 4, 128), torch.float32)) == 1


@pytest.mark.parametrize("options", [{"use_reentrant": False}, coterie.checkpointing(), {"use_reentrant": True}])
def test_checkpointing(options, pretend):
    experts, device = packed(FORMATS[0], SIZES), pretend.DEVICE
    expected, x = X.clone().requires_grad_(), X.to(device).requires_grad_()
    ids, weights = IDS.to(device), WEIGHTS.to(device)
    experts(expected, IDS, WEIGHTS).square().sum().backward()
    checkpoint(lambda x: experts(x, ids, weights), x, **options).square().sum().backward()
    assert torch.equal(x.grad.cpu(), expected.grad)


class Watch(TorchDispatchMode):
    """Sees every operator, as checkpoints that keep some results do."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("moved", [None, (0, 2)], ids=["in RAM", "some on the device"])
@pytest.mark.parametrize("where", ["ram", "device"])
@pytest.mark.parametrize("watched", [False, True])
def test_one_thread_asks_for_what_was_kept(moved, where, watched, pretend):
    """Autograd has a thread for each device. Two that ask a checkpoint for what it recomputes both recompute it."""
    experts, device = Experts.pack(*dense(SIZES), format="int8"), pretend.DEVICE
    if moved:
        experts.move(device, moved)
    lora = {n: t.to(device if where == "device" else "cpu") for n, t in random_lora(SIZES, 4, torch.float32).items()}
    lora = ExpertLora(**{name: factor.requires_grad_() for name, factor in lora.items()})
    x, threads = X.to(device).requires_grad_(), []

    def kept(tensor):
        threads.append(threading.get_ident())
        return tensor

    watching = Watch() if watched else contextlib.nullcontext()
    with watching, torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, kept):
        hidden = x.square()
        found = experts(hidden, IDS.to(device), WEIGHTS.to(device), lora) + hidden.square()
    found.sum().backward()
    assert len(threads) > 10
    device_thread = max(set(threads), key=threads.count)
    late = [i for i, thread in enumerate(threads) if thread != device_thread]
    assert all(i > threads.index(device_thread) for i in late) and (where == "ram" or not late)


@pytest.mark.parametrize("retain", [True, False])
@pytest.mark.parametrize("moved", [None, (0, 2)], ids=["in RAM", "some on the device"])
def test_checkpointing_beside_other_experts(moved, retain, pretend):
    """As where experts are shared: their backward and that of experts in RAM are ready at the same time."""
    experts, device = Experts.pack(*dense(SIZES), format="bf16"), pretend.DEVICE
    if moved:
        experts.move(device, moved)
    ids, weights = IDS.to(device), WEIGHTS.to(device)
    gradients = []
    for how in ({}, coterie.checkpointing(retain)):
        x = X.to(device).requires_grad_()

        def layer(x):
            return experts(x.square(), ids, weights) + x.exp().square().sin()

        (checkpoint(layer, x, **how) if how else layer(x)).square().sum().backward()
        gradients.append(x.grad.cpu())
    assert torch.equal(*gradients)


def test_traced():
    """A fake tensor of a GPU that is not there gives a fake result on it."""
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        x, weights = torch.empty(9, 128, device="cuda"), torch.empty(9, 2, device="cuda")
        found = packed(FORMATS[0], SIZES)(x, torch.zeros(9, 2, dtype=torch.int64, device="cuda"), weights)
    assert (found.device.type, found.dtype, found.shape) == ("cuda", torch.float32, (9, 128))


def test_compiles_as_one_graph():
    """The call and its gradients, traced; RAM is the device here, torch compiles nothing for the pretended one."""
    experts = packed(FORMATS[0], SIZES)
    factors = {name: factor.requires_grad_() for name, factor in random_lora(SIZES, 4, torch.float32).items()}

    def block(x):
        return torch.relu(offload.forward(experts, x * 2, IDS, WEIGHTS, ExpertLora(**factors))) + x

    torch._dynamo.reset()
    found = []
    for compute in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        x = X.clone().requires_grad_()
        found.append(torch.autograd.grad(compute(x).sum(), [x, *factors.values()]))
    torch.testing.assert_close(*found)


def test_refused(pretend):
    experts, device = packed(FORMATS[0], SIZES), pretend.DEVICE
    with pytest.raises(ArgumentError, match="ids: expected a tensor on pretend:0, as x is, found cpu"):
        experts(X.to(device), IDS, WEIGHTS.to(device))
    with pytest.raises(ArgumentError, match="x: expected shape"):
        experts(X[:, :64].to(device), IDS.to(device), WEIGHTS.to(device))
    with pytest.raises(ArgumentError, match="expert id 4 of token 0 is out of range"):
        experts(X.to(device), (IDS * 0 + 4).to(device), WEIGHTS.to(device))
    with pytest.raises(ArgumentError, match="x: expected a CPU tensor, found pretend:0"):
        experts.submit(X.to(device), IDS.to(device), WEIGHTS.to(device))
