"""Experts in RAM, sent to the pretended device for many tokens: against the reference, and what is sent when."""

from __future__ import annotations

import weakref

import pytest
import torch
from batches import SIZES, batches
from engine_cases import FORMATS, dense, name_of, options
from gradient_cases import TOLERANCE, gradients, random_batch, random_lora, relative
from torch.utils.checkpoint import checkpoint

import coterie
from coterie import Activation, ExpertLora, Experts, machine, reference
from coterie.errors import ArgumentError
from coterie.formats import Formats, resolve
from coterie.gpu import delivery, rates, resident, streaming
from coterie.gpu.rates import Rates

SPEC = FORMATS[6]


def streamed(spec=SPEC, sizes=SIZES, has_gate=True, **more):
    """Experts that are always sent, and their weights."""
    experts = Experts.pack(*dense(sizes, has_gate), format=spec, **more)
    experts.stream(from_tokens=0)
    return experts, experts.dequantize()


def there(pretend, *tensors):
    return [tensor.to(pretend.DEVICE) for tensor in tensors]


def called(pretend, experts, x, ids, weights, lora=None):
    """The output in RAM."""
    found = experts(*there(pretend, x, ids, weights), lora)
    assert found.device == pretend.DEVICE
    return found.cpu()


def sent(pretend, experts):
    """How many experts were sent in each piece since the last time; nothing but them is of uint8."""
    pieces = [shape for place, shape, dtype in pretend.copied if place == "device" and dtype == torch.uint8]
    pretend.copied.clear()
    assert all(nbytes == experts.expert_nbytes for _, nbytes in pieces)
    return [count for count, _ in pieces]


@pytest.fixture(params=["one piece", "pieces"])
def pieces(request, monkeypatch):
    """All experts at once, and two at a time."""
    if request.param == "pieces":
        monkeypatch.setattr(resident, "PIECE_NBYTES", 2 * 3 * 2 * SIZES[1] * SIZES[2])


@pytest.mark.parametrize("spec", [*FORMATS, Formats(resolve("q4_k"), resolve("q6_k"))], ids=name_of)
def test_formats(spec, pretend):
    experts, truth = streamed(spec)
    x, ids, weights, _ = random_batch(SIZES, 2, 33)
    found = called(pretend, experts, x, ids, weights)
    assert found.dtype == torch.bfloat16
    assert relative(found, reference.forward(x, ids, weights, *truth)) < TOLERANCE


@pytest.mark.parametrize("batch", list(batches()), ids=lambda batch: batch[0])
def test_batches(batch, pretend, pieces):
    experts, truth = streamed()
    _, x, ids, weights = batch
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = called(pretend, experts, x.to(dtype), ids, weights)
        assert (found.dtype, found.shape) == (dtype, x.shape)
        assert relative(found, reference.forward(x, ids, weights, *truth)) < TOLERANCE
    asked = ids[ids >= 0].unique()
    assert sum(sent(pretend, experts)) == 3 * len(asked)


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize("moved", [False, True], ids=["LoRA in RAM", "LoRA on the device"])
@pytest.mark.parametrize("spec", [FORMATS[0], SPEC, FORMATS[-1]], ids=name_of)
def test_gradients(spec, moved, rank, pretend, pieces):
    experts, truth = streamed(spec)
    x, ids, weights, grad = random_batch(SIZES, 2, 20)
    lora = random_lora(SIZES, rank, torch.float32)
    expected = gradients(
        lambda x, w, lora: reference.forward(x, ids, w, *truth, lora=lora), x, weights, lora, grad, torch.float32
    )
    x, ids, weights, grad = there(pretend, x, ids, weights, grad)
    lora = dict(zip(lora, there(pretend, *lora.values()), strict=True)) if moved else lora
    for _ in range(2):
        found = gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, lora, grad)
        for name, value in found.items():
            assert value.device == lora.get(name, ids).device, name
            assert relative(value.cpu(), expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "no gate"])
def test_biases_and_activation(has_gate, pretend, pieces):
    activation = Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0)
    biases = {"up_bias": torch.randn(6, 256), "down_bias": torch.randn(6, 128)}
    biases |= {"gate_bias": torch.randn(6, 256)} if has_gate else {}
    experts, truth = streamed(has_gate=has_gate, activation=activation, **biases)
    x, ids, weights, grad = random_batch(SIZES, 2, 24)
    lora = random_lora(SIZES, 8, torch.float32, has_gate)
    expected = gradients(
        lambda x, w, lora: reference.forward(x, ids, w, *truth, activation, **biases, lora=lora),
        x, weights, lora, grad, torch.float32,
    )  # fmt: skip
    x, ids, weights, grad = there(pretend, x, ids, weights, grad)
    found = gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, lora, grad)
    for name, value in found.items():
        assert relative(value.cpu(), expected[name]) < TOLERANCE, name


def test_experts_with_tokens_are_sent_forward_and_backward(pretend, monkeypatch):
    experts, _ = streamed()
    x, ids, weights, grad = there(pretend, *random_batch(SIZES, 2, 20))
    x.requires_grad_()
    pretend.copied.clear()
    experts(x, ids, weights).backward(grad)
    assert sent(pretend, experts) == [6, 6]
    for staged, expected in ((2 * experts.expert_nbytes, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(delivery, "STAGED_NBYTES", staged)
        y = experts(x, ids.where(ids != 3, 2), weights)
        assert sent(pretend, experts) == expected
        y.backward(grad)
        assert sent(pretend, experts) == expected


def test_tokens_stay_where_they_are(pretend):
    experts, _ = streamed()
    x, ids, weights = there(pretend, *random_batch(SIZES, 2, 20)[:3])
    pretend.copied.clear()
    experts(x, ids, weights)
    assert {dtype for place, _, dtype in pretend.copied if place == "host"} == {torch.int64}
    assert max(len(shape) for place, shape, _ in pretend.copied if place == "host") <= 2


def test_one_piece_is_there_at_a_time(pretend, monkeypatch):
    monkeypatch.setattr(resident, "PIECE_NBYTES", 2 * 3 * 2 * SIZES[1] * SIZES[2])
    experts, _ = streamed()
    codes, counts, original = [], [], Experts.unpacked

    def unpacked(self, part):
        counts.append(sum(ref() is not None for ref in codes))
        made = original(self, part)
        codes.extend(weakref.ref(matrices.codes) for matrices in made.values())
        return made

    monkeypatch.setattr(Experts, "unpacked", unpacked)
    x, ids, weights, grad = there(pretend, *random_batch(SIZES, 2, 20))
    y = experts(x.requires_grad_(), ids, weights)
    assert len(codes) == 9 and not any(ref() is not None for ref in codes)
    y.backward(grad)
    assert len(codes) == 18 and counts == [0] * 6 and not any(ref() is not None for ref in codes)

    y = experts(x, ids, weights)
    monkeypatch.setattr(resident, "product", None)
    with pytest.raises(TypeError) as caught:
        y.backward(grad)
    assert len(codes) == 30 and caught.value is not None and not any(ref() is not None for ref in codes)


def test_only_the_activations_are_kept(pretend):
    experts, _ = streamed()
    x, ids, weights = there(pretend, *random_batch(SIZES, 2, 20)[:3])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes), lambda _: None):
        experts(x.requires_grad_(), ids, weights)
    assert sum(kept) == x.nbytes + ids.nbytes + weights.nbytes + 2 * 2 * SIZES[2] * (ids >= 0).sum().item()


def test_an_error_on_the_way(pretend, monkeypatch):
    """Nothing of it is left, and the next call is as ever."""
    monkeypatch.setattr(resident, "PIECE_NBYTES", 2 * 3 * 2 * SIZES[1] * SIZES[2])
    experts, _ = streamed()
    x, ids, weights, grad = there(pretend, *random_batch(SIZES, 2, 20))
    leaf = x.clone().requires_grad_()
    expected = experts(leaf, ids, weights)
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad)
    closed, original, product = [], delivery.deliver, resident.product

    def watched(*args):
        try:
            yield from original(*args)
        finally:
            closed.append(True)

    monkeypatch.setattr(delivery, "deliver", watched)
    for fails_at in (1, 3, 4, 6, 8):  # forward: two products a piece; then backward
        calls = []

        def failing(*args, calls=calls, fails_at=fails_at):
            calls.append(args)
            if len(calls) == fails_at:
                raise MemoryError("out of memory")
            return product(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resident, "product", failing)
            with pytest.raises(MemoryError, match="out of memory") as caught:
                torch.autograd.grad(experts(leaf, ids, weights), leaf, grad)
        # Held as a debugger would hold it, the error keeps nothing open.
        assert caught.value is not None and closed == [True] * (1 if fails_at < 7 else 2)
        closed.clear()
        found = experts(leaf, ids, weights)
        assert torch.equal(found.cpu(), expected.cpu())
        assert torch.equal(torch.autograd.grad(found, leaf, grad)[0].cpu(), expected_grad.cpu())
        closed.clear()


RATES = Rates(read=1e9, bf16=2e9, int8=8e9, delivered=0.1e9, products=100e9)


def test_where_it_is_faster():
    """Of 8 experts of 2 a token, 100 MB and 200 M weights each."""
    assert rates.expected_experts(8, 2, 1) == 2 and rates.expected_experts(8, 8, 1) == 8
    assert rates.expected_experts(8, 2, 2) == pytest.approx(3.5)
    assert RATES.in_ram(2e9, 1e9, True) == 2 and RATES.in_ram(1e9, 16e9, True) == 2
    assert RATES.in_ram(1e9, 16e9, False) == 8
    assert RATES.streamed(1e9, 200e9) == 12


@pytest.mark.parametrize(("activations", "rate"), [("bf16", 2e9), ("int8", 8e9)])
def test_the_way_is_chosen_by_tokens(activations, rate, pretend):
    """Where all experts have tokens, bytes to be sent against operations for each token."""
    experts = Experts.pack(*dense(SIZES), **options(SPEC))
    experts.activations = activations
    first, of_a_token = 60, 2 * 2 * 3 * SIZES[1] * SIZES[2]
    delivered = experts.nbytes * rate / (of_a_token * (first - 0.5))
    experts.stream(rates=Rates(read=1e30, bf16=2e9, int8=8e9, delivered=delivered, products=1e30))
    for tokens in (0, 1, 30, first - 1, first, 2 * first):
        x, ids, weights, _ = random_batch(SIZES, 2, tokens)
        pretend.copied.clear()
        called(pretend, experts, x, ids, weights)
        assert bool(sent(pretend, experts)) == (tokens >= first), tokens


def test_a_number_of_tokens(pretend):
    experts, truth = streamed(activations="bf16")
    experts.stream(from_tokens=10)
    for tokens in (9, 10):
        x, ids, weights, _ = random_batch(SIZES, 2, tokens)
        pretend.copied.clear()
        found = called(pretend, experts, x, ids, weights)
        assert len(sent(pretend, experts)) == (tokens == 10)
        assert relative(found, reference.forward(x, ids, weights, *truth)) < TOLERANCE


def test_rates_are_measured_once(pretend, monkeypatch):
    monkeypatch.setattr(rates, "STAGED_NBYTES", 1 << 20)
    monkeypatch.setattr(rates, "ROWS", 4)
    rates.measured.cache_clear()
    experts, _ = streamed()
    experts.stream()
    try:
        found = rates.measured(pretend.DEVICE)
        assert min(found.read, found.bf16, found.int8, found.delivered, found.products) > 1e6
        monkeypatch.setattr(rates, "delivered", lambda _: pytest.fail("measured again"))
        x, ids, weights, _ = random_batch(SIZES, 2, 20)
        called(pretend, experts, x, ids, weights)
    finally:
        rates.measured.cache_clear()


def test_copies_are_timed(pretend, monkeypatch):
    monkeypatch.setattr(machine, "LINK_NBYTES", 1 << 16)
    monkeypatch.setattr(machine, "GPU_NBYTES", 1 << 16)
    assert min(machine.link_rates(pretend.DEVICE, 0.01)) > 1e5
    places = [place for place, shape, _ in pretend.copied if shape == (1 << 16,)]
    assert len(places) >= 5 and set(places) == {"device", "host"}
    pretend.copied.clear()
    assert machine.gpu_bandwidth(pretend.DEVICE, 0.01) > 1e5 and not pretend.copied


@pytest.mark.parametrize("how", [{"use_reentrant": False}, coterie.checkpointing(), {"use_reentrant": True}])
def test_checkpointing(how, pretend):
    experts, _ = streamed()
    x, ids, weights, grad = there(pretend, *random_batch(SIZES, 2, 20))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    experts(one, ids, weights).backward(grad)
    checkpoint(lambda x: experts(x, ids, weights), two, preserve_rng_state=False, **how).backward(grad)
    assert torch.equal(one.grad.cpu(), two.grad.cpu())


def test_what_is_trained_goes_one_way(pretend):
    """That of bf16 activations from the first forward on, so that a checkpoint computes again what it computed."""
    experts = Experts.pack(*dense(SIZES), **options(SPEC))
    delivered = experts.nbytes * 2e9 / (2 * 2 * 3 * SIZES[1] * SIZES[2] * 20)  # from 20 tokens on in bf16, 80 in int8
    experts.stream(rates=Rates(read=1e30, bf16=2e9, int8=8e9, delivered=delivered, products=1e30))
    x, ids, weights, grad = there(pretend, *random_batch(SIZES, 2, 40))
    pretend.copied.clear()
    experts(x, ids, weights)
    assert not sent(pretend, experts) and experts.uses_int8()
    x.requires_grad_()
    how = {"use_reentrant": False, "preserve_rng_state": False}
    checkpoint(lambda x: experts(x, ids, weights), x, **how).backward(grad)
    assert sent(pretend, experts) == [6, 6, 6]


def test_trained_through_they_compute_in_bf16_from_then_on(pretend):
    experts, _ = streamed()
    x, ids, weights = there(pretend, *random_batch(SIZES, 2, 20)[:3])
    experts(x, ids, weights)
    assert experts.uses_int8()
    experts(x.requires_grad_(), ids, weights)
    assert not experts.uses_int8()
    experts.activations = "int8"
    with pytest.raises(ArgumentError, match="int8 activations are for inference"):
        experts(x, ids, weights)


def test_tokens_in_ram_are_computed_there(pretend):
    experts, _ = streamed()
    x, ids, weights, _ = random_batch(SIZES, 2, 20)
    plain = Experts.pack(*dense(SIZES), **options(SPEC))
    assert torch.equal(experts(x, ids, weights), plain(x, ids, weights)) and not pretend.copied


def test_refused(pretend):
    experts, _ = streamed()
    x, ids, weights = there(pretend, *random_batch(SIZES, 2, 4)[:3])
    for wrong in (6, -2):
        with pytest.raises(ArgumentError, match=rf"ids: expected experts 0..5, or -1 for none, found {wrong}"):
            experts(x, torch.full_like(ids, wrong), weights)
    with pytest.raises(ArgumentError, match="ids: expected a tensor on pretend:0, found cpu"):
        experts(x, ids.cpu(), weights)
    with pytest.raises(ArgumentError, match="LoRA of up: expected both A and B"):
        experts(x, ids, weights, ExpertLora(up_a=torch.zeros(6, 8, 128)))
    with pytest.raises(ArgumentError, match="move: these experts are sent"):
        experts.move(pretend.DEVICE)
    with pytest.raises(ArgumentError, match="from_tokens of at least 0, found -1"):
        experts.stream(-1)
    plain = Experts.pack(*dense(SIZES), format="int8")
    plain.move(pretend.DEVICE, (1, 2))
    with pytest.raises(ArgumentError, match="stream: 2 of these experts were moved"):
        plain.stream()


def test_the_pieces_of_a_call_are_its_own(pretend, pieces):
    """Forwards of two calls, then their backwards."""
    experts, _ = streamed()
    x, ids, weights, grad = there(pretend, *random_batch(SIZES, 2, 20))
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    ys = experts(one, ids, weights), streaming.compute(experts, two, ids, weights, None)
    torch.autograd.backward(ys, [grad, grad])
    assert torch.equal(ys[0].cpu(), ys[1].cpu()) and torch.equal(one.grad.cpu(), two.grad.cpu())
