"""Experts in RAM called with tensors on a real GPU: the bits, the order of copies, the gradients."""

from __future__ import annotations

import gc

import pytest
import torch
from engine_cases import FORMATS, Batch, dense, dequantized, name_of, packed
from gradient_cases import TOLERANCE, gradients, random_batch, random_lora, relative
from torch.utils.checkpoint import checkpoint

import coterie
from coterie import ExpertLora, Experts, reference
from coterie.errors import ArgumentError
from coterie.gpu import ordered
from coterie.gpu.transfer import CudaTransfer, transfer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")

SIZES = (4, 128, 256)
SPECS = [FORMATS[0], FORMATS[1], FORMATS[6]]
X, IDS, WEIGHTS = Batch(9, 2).tensors(SIZES)
A_WHILE = 50_000_000  # cycles, some hundredths of a second


def on_gpu(*tensors):
    return [tensor.cuda() for tensor in tensors]


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_same_bits_as_in_ram(spec, dtype):
    experts, x = packed(spec, SIZES), X.to(dtype)
    found = experts(*on_gpu(x, IDS, WEIGHTS))
    assert found.is_cuda and found.dtype == dtype
    assert torch.equal(found.cpu(), experts(x, IDS, WEIGHTS))


def test_transfer_is_pinned():
    copies = transfer(torch.device("cuda", 0))
    assert isinstance(copies, CudaTransfer)
    value = torch.randn(64, 32, device="cuda").T
    (host,) = copies.to_host([value])
    assert host.is_pinned() and host.is_contiguous() and torch.equal(host, value.cpu())
    (back,) = copies.to_device([host])
    assert back.is_cuda and torch.equal(back, value)


def test_any_strides_and_no_tokens():
    experts = packed(FORMATS[0], SIZES)
    x, ids, weights = X.T.contiguous().cuda().T, IDS.int().cuda(), WEIGHTS.T.contiguous().cuda().T
    assert torch.equal(experts(x, ids, weights).cpu(), experts(X, IDS, WEIGHTS))
    assert experts(x[:0], ids[:0], weights[:0]).shape == (0, 128)


def test_waits_for_what_is_queued():
    """Inputs that a busy stream has yet to write, overwritten as soon as the call returns."""
    experts = packed(FORMATS[0], SIZES)
    x, ids, weights = on_gpu(X, IDS, WEIGHTS)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(A_WHILE)
            late.copy_(x)
            doubled = experts(late, ids, weights) * 2
            late.zero_()
        stream.synchronize()
        assert torch.equal(doubled.cpu(), experts(X, IDS, WEIGHTS) * 2)


def test_pinned_memory_is_not_reused_too_early():
    experts, device = packed(FORMATS[0], SIZES), torch.device("cuda")
    _, ids, weights = Batch(512, 2).tensors(SIZES)
    ids_there, weights_there = on_gpu(ids, weights)
    xs = torch.randn(16, 512, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.cuda._sleep(A_WHILE)
    found = [experts(x, ids_there, weights_there) for x in xs.to(device)]
    for x, y in zip(xs, found, strict=True):
        assert torch.equal(y.cpu(), experts(x, ids, weights))


def test_weights_stay_in_ram():
    experts = Experts.empty(8, 1024, 1024, format="bf16")
    x = torch.randn(4, 1024, device="cuda")
    ids, weights = torch.zeros(4, 2, dtype=torch.int64, device="cuda"), torch.rand(4, 2, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    experts(x, ids, weights)
    assert torch.cuda.max_memory_allocated() - before < experts.expert_nbytes


@pytest.mark.parametrize("where", ["ram", "device", "A on the device"])
@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_gradients(where, side):
    """Of x, routing weights and LoRA, each where its tensor is; as in RAM to the bit, as in plain torch nearly."""
    experts = packed(FORMATS[6], SIZES)
    x, ids, weights, grad = random_batch(SIZES, 2, 12)
    lora = random_lora(SIZES, 4, torch.float32)
    there = {n: t.cuda() if where == "device" or (n[-1] == "a" and where != "ram") else t for n, t in lora.items()}

    expected = gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, lora, grad)
    truth = gradients(
        lambda x, w, lora: reference.forward(x, ids, w, *dequantized(FORMATS[6], SIZES), lora=lora),
        x, weights, lora, grad, torch.float32,
    )  # fmt: skip
    x, ids, weights, grad = on_gpu(x, ids, weights, grad)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.current_stream()):
        found = gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, there, grad)
        torch.cuda.current_stream().synchronize()
    for name, value in found.items():
        assert value.device == there.get(name, ids).device, name
        assert torch.equal(value.cpu(), expected[name]), name
        assert relative(value.cpu(), truth[name]) < TOLERANCE, name


def test_gradients_on_another_stream_than_what_made_x():
    """x on the default stream, experts on a side stream: the gradient of x is used on the default stream."""
    experts = packed(FORMATS[0], SIZES)
    x, ids, weights = on_gpu(X, IDS, WEIGHTS)
    expected = X.clone().requires_grad_()
    (experts(expected * 3, IDS, WEIGHTS)).sum().backward()
    x.requires_grad_()
    side = torch.cuda.Stream()
    tripled = x * 3
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        y = experts(tripled, ids, weights)
    torch.cuda.current_stream().wait_stream(side)
    y.sum().backward()
    torch.testing.assert_close(x.grad.cpu(), expected.grad)


@pytest.mark.parametrize("options", [{"use_reentrant": False}, coterie.checkpointing(), {"use_reentrant": True}])
def test_checkpointing(options):
    experts = packed(FORMATS[0], SIZES)
    expected, x = X.clone().requires_grad_(), X.cuda().requires_grad_()
    ids, weights = on_gpu(IDS, WEIGHTS)
    experts(expected, IDS, WEIGHTS).sum().backward()
    checkpoint(lambda x: experts(x, ids, weights), x, **options).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), expected.grad)


@pytest.mark.parametrize("where", [None, "cpu", "cuda"])
def test_compiles_as_one_graph(where):
    """Without LoRA, and with its factors on either side."""
    experts = packed(FORMATS[0], SIZES)
    factors = random_lora(SIZES, 4, torch.float32) if where else {}
    factors = {name: factor.to(where).requires_grad_() for name, factor in factors.items()}

    def block(x, ids, weights):
        return torch.relu(experts(x * 2, ids, weights, ExpertLora(**factors) if factors else None)) + x

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x, ids, weights = on_gpu(X, IDS, WEIGHTS)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, ids, weights), block(x, ids, weights))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    for compute, inputs in ((compiled, one), (block, two)):
        compute(inputs, ids, weights).sum().backward()
    torch.testing.assert_close(one.grad, two.grad)


def test_inductor():
    """The mode that `generate` compiles in for a static cache; CUDA graphs leave out what copies to RAM."""
    pytest.importorskip("triton")
    experts = packed(FORMATS[0], SIZES)

    def block(x, ids, weights):
        return torch.relu(experts(x * 2, ids, weights)) + x

    torch._dynamo.reset()
    compiled = torch.compile(block, mode="reduce-overhead")
    x, ids, weights = on_gpu(X, IDS, WEIGHTS)
    with torch.no_grad():
        for scale in (1, 2, 3):
            torch.testing.assert_close(compiled(x * scale, ids, weights), block(x * scale, ids, weights))


def test_autocast():
    experts = packed(FORMATS[0], SIZES)
    x, ids, weights = on_gpu(X, IDS, WEIGHTS)
    with torch.autocast("cuda", torch.bfloat16):
        found = experts(x, ids, weights)
    assert torch.equal(found.cpu(), experts(X, IDS, WEIGHTS))


def test_refused():
    experts = packed(FORMATS[0], SIZES)
    x, ids, weights = on_gpu(X, IDS, WEIGHTS)
    with pytest.raises(ArgumentError, match="ids: expected a tensor on cuda:0, as x is, found cpu"):
        experts(x, IDS, weights)
    with pytest.raises(ArgumentError, match="x: expected a CPU tensor, found cuda:0"):
        experts.submit(x, ids, weights)
    many = [t.repeat(8, 1) for t in (x, ids * 0 + 4, weights)]
    with pytest.raises(ArgumentError, match="expert id 4 of token 0 is out of range"):
        experts(*many)


def test_few_tokens_are_not_waited_for():
    """Python goes on while the stream is busy; what fails then is raised by a later call."""
    experts = packed(FORMATS[0], SIZES)
    x, ids, weights = on_gpu(X, IDS, WEIGHTS)
    experts(x, ids, weights)
    torch.cuda.synchronize()
    torch.cuda._sleep(A_WHILE)
    found, wrong = experts(x, ids, weights), experts(x, ids * 0 + 4, weights)
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert torch.equal(found.cpu(), experts.submit(X, IDS, WEIGHTS).wait()) and wrong.isnan().all()
    with pytest.raises(ArgumentError, match=r"an earlier call .* expert id 4 of token 0 is out of range"):
        experts(x, ids, weights)


@pytest.mark.parametrize("moved", [[], [0, 2], None], ids=["in RAM", "on both", "on the GPU"])
def test_captured(moved):
    """As a CUDA graph, which keeps what it needs, and is replayed with other inputs."""
    experts = Experts.pack(*dense(SIZES), format="int8")
    experts.adapt()
    expected = experts(X * 3, IDS.flip(0), WEIGHTS)
    if moved != []:
        experts.move("cuda", moved)
    inputs = on_gpu(X, IDS, WEIGHTS)
    for _ in range(2):
        experts(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = experts(*inputs) * 2
    del experts
    gc.collect()
    for tensor, changed in zip(inputs, (X * 3, IDS.flip(0), WEIGHTS), strict=True):
        tensor.copy_(changed)
    for _ in range(3):
        out.zero_()
        graph.replay()
    torch.cuda.synchronize()
    assert relative(out.cpu() / 2, expected) < (0.01 if moved != [] else 1e-6)
    ordered.check()
