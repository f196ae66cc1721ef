"""Experts moved to a device, which is the CPU here: against the reference, forward and backward."""

from __future__ import annotations

import pytest
import torch
from batches import SIZES, batches, check_compiled
from engine_cases import FORMATS, dense, name_of
from gradient_cases import TOLERANCE, gradients, random_batch, random_lora, relative
from torch.utils.checkpoint import checkpoint

import coterie
from coterie import Activation, ExpertLora, Experts, ops, reference
from coterie.activations import KINDS
from coterie.errors import ArgumentError, DeviceError
from coterie.formats import Formats, resolve
from coterie.gpu import resident
from coterie.gpu.activate import activate
from coterie.gpu.transfer import Transfer

SPEC = FORMATS[6]
# Gate and up in the first, down in the second.
TWO = [Formats(resolve(a), resolve(b)) for a, b in (("q4_k", "q6_k"), ("int8", "nvfp4"), ("fp8_block", "int4"))]
PLACES = {"all": None, "some": (0, 2, 3)}  # experts on the device


def moved(spec=SPEC, sizes=SIZES, experts=None, has_gate=True, **more):
    found = Experts.pack(*dense(sizes, has_gate), format=spec, **more)
    found.activations = "bf16" if spec.int8_activations else "auto"
    truth = found.dequantize()
    found.move("cpu", experts)
    return found, truth


@pytest.fixture(params=["one piece", "pieces"])
def pieces(request, monkeypatch):
    """All experts at once, and two at a time."""
    if request.param == "pieces":
        monkeypatch.setattr(resident, "PIECE_NBYTES", 2 * 3 * 2 * SIZES[1] * SIZES[2])


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("spec", [*FORMATS, *TWO], ids=name_of)
def test_formats(spec, where):
    experts, truth = moved(spec, experts=PLACES[where])
    x, ids, weights, _ = random_batch(SIZES, 2, 33)
    found = experts(x, ids, weights)
    assert found.dtype == torch.bfloat16
    assert relative(found, reference.forward(x, ids, weights, *truth)) < TOLERANCE


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("batch", list(batches()), ids=lambda batch: batch[0])
def test_batches(batch, where, pieces):
    experts, truth = moved(experts=PLACES[where])
    _, x, ids, weights = batch
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = experts(x.to(dtype), ids, weights)
        assert (found.dtype, found.shape) == (dtype, x.shape)
        assert relative(found, reference.forward(x, ids, weights, *truth)) < TOLERANCE


def test_what_a_token_without_experts_holds_does_not_matter(pieces):
    experts, _ = moved()
    x, ids, weights, _ = random_batch(SIZES, 2, 5)
    ids[2], x[2] = -1, torch.inf
    x.requires_grad_()
    found = experts(x, ids, weights)
    (grad,) = torch.autograd.grad(found.float().square().sum(), x)
    assert found.isfinite().all() and not found[2].any() and not grad[2].any() and grad.isfinite().all()


@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_and_biases(kind, has_gate, pieces):
    """Where slopes jump, rounding decides: limits are as far away as gpt-oss has them, and nothing is added before
    relu, so that sums that cancel do not change their sign."""
    activation, sizes = Activation(kind, alpha=1.702 if kind == "silu" else 1.0, limit=7.0, up_offset=0.5), SIZES
    biases = {"up_bias": torch.randn(6, 256), "down_bias": torch.randn(6, 128)}
    biases |= {"gate_bias": torch.randn(6, 256)} if has_gate else {}
    lora = random_lora(sizes, 8, torch.float32, has_gate)
    if kind == "relu":
        biases, lora = ({name: t for name, t in made.items() if name.startswith("down")} for made in (biases, lora))
    experts, truth = moved(sizes=sizes, has_gate=has_gate, activation=activation, **biases)
    x, ids, weights, grad = random_batch(sizes, 2, 24)
    found = gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, lora, grad)
    expected = gradients(
        lambda x, w, lora: reference.forward(x, ids, w, *truth, activation, **biases, lora=lora),
        x, weights, lora, grad, torch.float32,
    )  # fmt: skip
    for name, value in found.items():
        assert relative(value, expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("kind", KINDS)
def test_activate(kind, has_gate):
    """In float32, so that nothing is near a limit."""
    up = torch.randn(50, 40, requires_grad=True)
    inputs = [torch.randn(50, 40, requires_grad=True), up] if has_gate else [up]
    gate = inputs[0] if has_gate else None
    for changes in ({}, {"limit": 0.7}, {"up_offset": 1.0}, {"alpha": 1.702, "limit": 1.0}):
        activation = Activation(kind, **changes)
        found, expected = activate(activation, gate, up), reference.act(activation, gate, up)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)
        )


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("spec", [FORMATS[0], FORMATS[1], FORMATS[6], FORMATS[9], *FORMATS[13:], *TWO], ids=name_of)
def test_gradients(spec, where):
    check_gradients(spec, PLACES[where], 8, torch.float32)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ranks(rank, dtype, where, pieces):
    check_gradients(SPEC, PLACES[where], rank, dtype)


def check_gradients(spec, where, rank, dtype, sizes=SIZES):
    experts, truth = moved(spec, sizes, where)
    x, ids, weights, grad = random_batch(sizes, 2, 20)
    lora = random_lora(sizes, rank, dtype)
    found = gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, lora, grad)
    expected = gradients(
        lambda x, w, lora: reference.forward(x, ids, w, *truth, lora=lora), x, weights, lora, grad, torch.float32
    )
    for name, value in found.items():
        assert relative(value, expected[name]) < TOLERANCE, name
        assert value.dtype == {"y": x.dtype, "x": x.dtype, "weights": weights.dtype}.get(name, dtype)


def test_sizes_that_torch_has_no_product_for():
    check_gradients(FORMATS[0], None, 3, torch.float32, (3, 36, 20))


@pytest.mark.parametrize("where", PLACES)
def test_shared_a_and_one_projection(where, pieces):
    experts, truth = moved(experts=PLACES[where])
    x, ids, weights, grad = random_batch(SIZES, 2, 20)
    made = random_lora(SIZES, 8, torch.float32)
    for names in (("gate_a", "gate_b", "up_b"), ("down_a", "down_b"), ("up_a", "up_b")):
        lora = {name: made[name] for name in names}
        found = gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, lora, grad)
        expected = gradients(
            lambda x, w, lora: reference.forward(x, ids, w, *truth, lora=lora), x, weights, lora, grad, torch.float32
        )
        for name, value in found.items():
            assert relative(value, expected[name]) < TOLERANCE, name


def test_experts_without_tokens_get_zeros(pieces):
    experts, _ = moved()
    x, ids, weights, grad = random_batch(SIZES, 2, 9)
    ids = ids.where(ids != 3, 2)
    lora = random_lora(SIZES, 8, torch.float32)
    found = gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, lora, grad)
    for name in lora:
        assert not found[name][3].any() and found[name][2].any(), name


def test_same_bits_every_time(pieces):
    experts, _ = moved()
    x, ids, weights, grad = random_batch(SIZES, 3, 20)
    lora = random_lora(SIZES, 8, torch.float32)
    one, two = (gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, lora, grad) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_device_is_at_work_while_the_cpu_computes(monkeypatch):
    """Its work is queued when the tokens are in RAM, before the CPU begins."""
    experts, _ = moved(experts=(0, 2, 3))
    x, ids, weights, _ = random_batch(SIZES, 2, 20)
    begun = []

    def noted(owner, name, what):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: begun.append(what) or original(*args))

    noted(Transfer, "to_host", "tokens to RAM")
    noted(resident.Resident, "forward", "device")
    noted(ops, "forward", "CPU")
    noted(Transfer, "to_device", "result back")
    with torch.no_grad():
        experts(x, ids, weights)
    assert begun == ["tokens to RAM", "device", "CPU", "result back"]


def test_only_the_activations_are_kept():
    """For the backward: inputs and what stands before the activation, no dense weights."""
    experts, _ = moved()
    x, ids, weights, _ = random_batch(SIZES, 2, 20)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes), lambda _: None):
        experts(x.requires_grad_(), ids, weights)
    assert sum(kept) == x.nbytes + ids.nbytes + weights.nbytes + 2 * 2 * SIZES[2] * ids.numel()


def test_one_piece_is_dense_at_a_time(monkeypatch):
    monkeypatch.setattr(resident, "PIECE_NBYTES", 2 * 3 * 2 * SIZES[1] * SIZES[2])
    seen, dense_of = [], resident.Resident.dense

    def dense(self, names, chosen, **more):
        seen.append(len(chosen))
        return dense_of(self, names, chosen, **more)

    monkeypatch.setattr(resident.Resident, "dense", dense)
    experts, _ = moved()
    x, ids, weights, _ = random_batch(SIZES, 2, 20)
    experts(x.requires_grad_(), ids, weights).sum().backward()
    assert set(seen) == {2} and len(seen) == 12
    seen.clear()
    experts(x, ids.where(ids > 3, 1), weights)
    assert sum(seen) == 2 * 3  # experts 1, 4 and 5 alone, gate with up and down


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("how", [{"use_reentrant": False}, coterie.checkpointing(), {"use_reentrant": True}])
def test_checkpointing(how, where):
    experts, _ = moved(experts=PLACES[where])
    x, ids, weights, grad = random_batch(SIZES, 2, 20)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    experts(one, ids, weights).backward(grad)
    checkpoint(lambda x: experts(x, ids, weights), two, **how).backward(grad)
    assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, where):
    experts, _ = moved(experts=PLACES[where])
    x, ids, weights, _ = random_batch(SIZES, 2, 20)
    with torch.autocast("cpu", dtype):
        found = experts(x, ids, weights)
    assert torch.equal(found, experts(x, ids, weights))


@pytest.mark.parametrize("where", PLACES)
def test_compiled(where):
    experts, _ = moved(experts=PLACES[where])
    x, ids, weights, _ = random_batch(SIZES, 2, 20)
    check_compiled(experts, x, ids, weights)


@pytest.mark.parametrize("spec", [*FORMATS, *TWO], ids=name_of)
def test_values_and_files(spec, tmp_path):
    experts, truth = moved(spec, experts=(1, 4))
    for found, expected in zip(experts.dequantize(), truth, strict=True):
        assert torch.equal(found, expected)
    experts.save(tmp_path)
    for found, expected in zip(Experts.open(tmp_path).dequantize(), truth, strict=True):
        assert torch.equal(found, expected)


def test_takes_no_ram(tmp_path):
    experts, _ = moved(experts=(1, 4))
    assert len(experts._weights) == 4
    pages = {data.untyped_storage().data_ptr(): data.untyped_storage().nbytes() for data in experts._weights.values()}
    assert sum(pages.values()) < 5 * experts.expert_nbytes
    assert "2 of them on cpu" in repr(experts)
    experts.save(tmp_path)
    mapped = Experts.open(tmp_path, mmap=True)
    before = {e: mapped.packed(e).data_ptr() for e in range(6)}
    mapped.move("cpu", (0,))
    assert all(mapped.packed(e).data_ptr() == before[e] for e in range(1, 6))


def test_refused():
    experts, _ = moved(experts=(1, 4))
    x, ids, weights, _ = random_batch(SIZES, 2, 4)
    with pytest.raises(ArgumentError, match="2 of these experts were moved before"):
        experts.move("cpu")
    with pytest.raises(ArgumentError, match="expected experts that are all in RAM"):
        experts.submit(x, ids, weights)
    with pytest.raises(ArgumentError, match="set biases before move"):
        experts.set_biases(up=torch.zeros(6, 256))
    with pytest.raises(ArgumentError, match="x: expected shape"):
        experts(x[:, :64], ids, weights)
    for wrong in (6, -2):
        with pytest.raises(ArgumentError, match=f"expert id {wrong} of token 0 is out of range"):
            experts(x, torch.full_like(ids, wrong), weights)
    with pytest.raises(ArgumentError, match="LoRA of up: expected both A and B"):
        experts(x, ids, weights, ExpertLora(up_a=torch.zeros(6, 8, 128)))
    plain = Experts.pack(*dense(SIZES), format="int8")
    for wrong in ((), (6,), (-1, 2)):
        with pytest.raises(ArgumentError, match="expected numbers from 0 to 5"):
            plain.move("cpu", wrong)
    with pytest.raises(DeviceError, match="cuda:99"):
        plain.move("cuda:99")
    with pytest.raises(ArgumentError, match="expert 1"):
        experts.pack_projection("up", 1, torch.zeros(256, 128))
