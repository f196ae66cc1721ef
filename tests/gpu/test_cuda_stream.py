"""Experts sent to a real GPU: against the reference, what overlaps, what memory it takes, and what an error leaves."""

from __future__ import annotations

import threading

import pytest
import torch
from batches import SIZES, batches, check_compiled
from engine_cases import FORMATS, dense, name_of, options
from gradient_cases import TOLERANCE, gradients, random_batch, random_lora, relative
from torch.utils.checkpoint import checkpoint

import coterie
from coterie import Activation, Experts, machine, reference
from coterie.errors import ArgumentError
from coterie.gpu import delivery, rates, resident

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")

SPEC = FORMATS[6]
A_WHILE = 50_000_000  # cycles, some hundredths of a second


def streamed(spec=SPEC, sizes=SIZES, **more):
    """Experts that are always sent, and their weights."""
    experts = Experts.pack(*dense(sizes), **options(spec), **more)
    experts.stream(from_tokens=0)
    return experts, experts.dequantize()


def on_gpu(*tensors):
    return [tensor.cuda() for tensor in tensors]


def two_at_a_time(monkeypatch):
    monkeypatch.setattr(resident, "PIECE_NBYTES", 2 * 3 * 2 * SIZES[1] * SIZES[2])
    monkeypatch.setattr(resident, "PIECE_SHARE", 0)


@pytest.fixture(params=["one piece", "pieces of two", "pieces of one"])
def pieces(request, monkeypatch):
    if request.param == "pieces of two":
        two_at_a_time(monkeypatch)
    if request.param == "pieces of one":
        monkeypatch.setattr(delivery, "STAGED_NBYTES", 1)


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_formats(spec):
    experts, truth = streamed(spec)
    x, ids, weights, _ = random_batch(SIZES, 2, 33)
    found = experts(*on_gpu(x, ids, weights))
    assert found.is_cuda and found.dtype == torch.bfloat16
    assert relative(found.cpu(), reference.forward(x, ids, weights, *truth)) < TOLERANCE


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_nothing_waits_where_a_piece_is_unpacked(spec):
    experts, _ = streamed(spec)
    data = torch.stack([experts.packed(e) for e in range(6)]).cuda()
    index = torch.arange(6, device="cuda")
    for mode in ("default", "error"):  # what is made once may wait once
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            matrices = experts.unpacked(lambda part: data[:, part])
            out = torch.empty(6, 256, 128, dtype=torch.bfloat16, device="cuda")
            matrices["up"].dense(index, out)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("batch", list(batches()), ids=lambda batch: batch[0])
def test_batches(batch, pieces):
    experts, truth = streamed()
    _, x, ids, weights = batch
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = experts(*on_gpu(x.to(dtype), ids, weights))
        assert (found.dtype, found.shape) == (dtype, x.shape)
        assert relative(found.cpu(), reference.forward(x, ids, weights, *truth)) < TOLERANCE


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("there", [True, False], ids=["LoRA on the GPU", "LoRA in RAM"])
def test_gradients(there, rank, pieces):
    experts, truth = streamed()
    x, ids, weights, grad = random_batch(SIZES, 2, 20)
    lora = random_lora(SIZES, rank, torch.float32)
    expected = gradients(
        lambda x, w, lora: reference.forward(x, ids, w, *truth, lora=lora), x, weights, lora, grad, torch.float32
    )
    lora = {name: factor.cuda() if there else factor for name, factor in lora.items()}
    x, ids, weights, grad = on_gpu(x, ids, weights, grad)
    for _ in range(2):
        found = gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, lora, grad)
        for name, value in found.items():
            assert value.device == lora.get(name, ids).device, name
            assert relative(value.cpu(), expected[name]) < TOLERANCE, name


def test_biases_and_activation(pieces):
    activation = Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0)
    biases = {"up_bias": torch.randn(6, 256), "down_bias": torch.randn(6, 128), "gate_bias": torch.randn(6, 256)}
    experts, truth = streamed(activation=activation, **biases)
    x, ids, weights, grad = random_batch(SIZES, 2, 24)
    expected = gradients(
        lambda x, w, _: reference.forward(x, ids, w, *truth, activation, **biases), x, weights, {}, grad, torch.float32
    )
    x, ids, weights, grad = on_gpu(x, ids, weights, grad)
    found = gradients(lambda x, w, _: experts(x, ids, w), x, weights, {}, grad)
    for name, value in found.items():
        assert relative(value.cpu(), expected[name]) < TOLERANCE, name


def test_same_bits_whatever_the_gpu_is_doing(pieces):
    """With what was queued before still running, on streams that take turns, buffers full of others' values."""
    experts, _ = streamed()
    x, ids, weights, grad = on_gpu(*random_batch(SIZES, 2, 40))
    leaf = x.clone().requires_grad_()
    expected = experts(leaf, ids, weights)
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad)
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            for _ in range(3):
                spoilt = torch.full((1 << 24,), torch.nan, device="cuda")
                torch.cuda._sleep(A_WHILE)
                spoilt.mul_(2)
                del spoilt
                late = torch.zeros_like(x).copy_(x).requires_grad_()
                found = experts(late, ids, weights)
                (found_grad,) = torch.autograd.grad(found, late, grad)
                assert torch.equal(found, expected) and torch.equal(found_grad, expected_grad)


def test_large_pieces_one_after_the_other():
    """Sixteen pieces of some MB, so that copies and computing do overlap, over pages that are no buffer's."""
    sizes = (64, 512, 768)
    experts = Experts.empty(*sizes, format="int8")
    random = torch.Generator().manual_seed(0)
    for name in experts.projections:
        for e in range(sizes[0]):
            weight = torch.randn(experts.shape(name), generator=random) / experts.shape(name)[1] ** 0.5
            experts.pack_projection(name, e, weight, scale_search=False)
    experts.activations = "bf16"
    x, ids, weights = on_gpu(*random_batch(sizes, 4, 512)[:3])
    expected = experts(x, ids, weights)
    experts.stream(from_tokens=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(delivery, "STAGED_NBYTES", 4 * experts.expert_nbytes)
        found = [experts(x, ids, weights) for _ in range(4)]
    assert relative(found[0], expected) < TOLERANCE
    assert all(torch.equal(found[0], other) for other in found[1:])
    whole = experts(x, ids, weights)
    assert relative(found[0], whole) < 1e-3


def test_threads():
    """Each call has buffers of its own."""
    experts, _ = streamed()
    given = [on_gpu(*random_batch(SIZES, 2, 20, draw)[:3]) for draw in range(4)]
    expected, wrong = [experts(*batch) for batch in given], []
    torch.cuda.synchronize()

    def work(batch, truth):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                if not torch.equal(experts(*batch), truth):
                    wrong.append(batch)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(given, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_memory_of_a_step():
    """Two pieces of packed experts, one of their codes, one that is dense, what taking them apart needs, and tokens;
    nothing afterwards."""
    sizes = (64, 512, 1024)
    experts = Experts.empty(*sizes, format=SPEC)
    experts.stream(from_tokens=0)
    x, ids, weights, grad = on_gpu(*random_batch(sizes, 2, 64))
    x.requires_grad_()
    piece = 4 * 2 * 3 * sizes[1] * sizes[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resident, "PIECE_NBYTES", piece)
        patch.setattr(resident, "PIECE_SHARE", 0)
        experts(x, ids, weights).backward(grad)
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        y = experts(x, ids, weights)
        kept = torch.cuda.memory_allocated() - before
        y.backward(grad)
        peak = torch.cuda.max_memory_allocated() - before
    assert kept < 4 * y.nbytes + 2 * 2 * sizes[2] * ids.numel() + (1 << 16)
    assert peak < 5 * piece < 2 * 3 * sizes[0] * sizes[1] * sizes[2] / 3
    del y
    x.grad = None
    assert torch.cuda.memory_allocated() - before < 1 << 16


@pytest.mark.parametrize("fails_at", [1, 3, 4, 6, 8])
def test_an_error_on_the_way(fails_at, monkeypatch):
    """Whatever was under way then, the next call is as ever."""
    two_at_a_time(monkeypatch)
    experts, _ = streamed()
    x, ids, weights, grad = on_gpu(*random_batch(SIZES, 2, 20))
    leaf = x.clone().requires_grad_()
    expected = experts(leaf, ids, weights)
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad)
    product, calls = resident.product, []

    def failing(*args):
        calls.append(args)
        if len(calls) == fails_at:
            raise MemoryError("out of memory")
        return product(*args)

    with monkeypatch.context() as patch:
        patch.setattr(resident, "product", failing)
        torch.cuda._sleep(A_WHILE)
        with pytest.raises(MemoryError, match="out of memory"):
            torch.autograd.grad(experts(leaf, ids, weights), leaf, grad)
    spoilt = torch.full((1 << 20,), 7.0, device="cuda")  # in memory that the failed call gave back
    found = experts(leaf, ids, weights)
    assert torch.equal(found, expected) and torch.equal(torch.autograd.grad(found, leaf, grad)[0], expected_grad)
    assert (spoilt == 7).all()


@pytest.mark.parametrize("how", [{"use_reentrant": False}, coterie.checkpointing(), {"use_reentrant": True}])
def test_checkpointing(how):
    experts, _ = streamed()
    x, ids, weights, grad = on_gpu(*random_batch(SIZES, 2, 20))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    experts(one, ids, weights).backward(grad)
    checkpoint(lambda x: experts(x, ids, weights), two, **how).backward(grad)
    assert torch.equal(one.grad, two.grad)


def test_compiled():
    experts, _ = streamed()
    x, ids, weights = on_gpu(*random_batch(SIZES, 2, 20)[:3])
    check_compiled(experts, x, ids, weights)


def test_mapped_experts(tmp_path):
    experts, _ = streamed()
    experts.save(tmp_path)
    mapped = Experts.open(tmp_path, mmap=True)
    mapped.stream(from_tokens=0)
    x, ids, weights, _ = random_batch(SIZES, 2, 33)
    assert torch.equal(mapped(*on_gpu(x, ids, weights)), experts(*on_gpu(x, ids, weights)))


def test_measured_rates_decide():
    device = torch.device("cuda", 0)
    found = rates.measured(device)
    assert found is rates.measured(device) and min(found.delivered, found.products, *machine.link_rates(device)) > 0
    experts, truth = streamed()
    experts.stream()
    for tokens in (1, 500):
        x, ids, weights, _ = random_batch(SIZES, 2, tokens)
        assert relative(experts(*on_gpu(x, ids, weights)).cpu(), reference.forward(x, ids, weights, *truth)) < 0.03


def test_refused():
    experts, _ = streamed()
    x, ids, weights = on_gpu(*random_batch(SIZES, 2, 4)[:3])
    for wrong in (6, -2):
        with pytest.raises(ArgumentError, match=rf"expected experts 0..5, or -1 for none, found {wrong}"):
            experts(x, torch.full_like(ids, wrong), weights)
    assert experts(x, ids, weights).isfinite().all()  # the GPU goes on


def test_models(tmp_path):
    """Logits and the losses of a few steps with LoRA on the experts, as on the CPU."""
    peft = pytest.importorskip("peft")
    pytest.importorskip("accelerate")
    import tiny_models

    tiny_models.make("qwen3_moe").save_pretrained(tmp_path)
    plain = coterie.from_pretrained(tmp_path, "int4", dtype=torch.float32, activations="bf16")
    model = coterie.from_pretrained(
        tmp_path, "int4", "cuda", dtype=torch.float32, activations="bf16", gpu_experts="stream:12"
    )
    ids = tiny_models.prompt(2, 12)
    with torch.no_grad():
        found, expected = model(ids.cuda()).logits.cpu(), plain(ids).logits
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.02, errors  # a token may choose another expert
    assert model.generate(ids.cuda(), max_new_tokens=4, do_sample=False).shape == (2, 16)
    config = {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    plain, model = (peft.get_peft_model(one, peft.LoraConfig(**config)) for one in (plain, model))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                model.get_parameter(name).copy_(parameter)
    losses = []
    for one in (plain, model):
        inputs = ids.to(one.device)
        optimizer = torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2, foreach=False)
        losses.append([])
        for _ in range(4):
            loss = one(inputs, labels=inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[1][-1] < losses[1][0]
