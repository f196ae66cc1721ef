"""Triton's kernels, on a GPU or in Triton's interpreter: against torch's operators on the same packed matrices."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, dense, matrix_shapes, name_of, options
from gradient_cases import TOLERANCE, gradients, random_batch, random_lora, relative

from coterie import Activation, Experts, reference
from coterie.activations import KINDS
from coterie.formats import Formats, resolve
from coterie.gpu import fast, products, resident, rows
from coterie.gpu.stream import unpacked

pytest.importorskip("triton", reason="no Triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = (6, 128, 256)
# The interpreter is slow: there, formats that differ in what kernels do.
FEW = [spec for spec in FORMATS if DEVICE.type == "cuda" or name_of(spec) in (
    "bf16-row", "int8-row", "int8-64", "int4-32", "int4-row-zero", "int4-64-zero", "fp8_block-128", "fp8_channel-row",
    "mxfp4-32", "mxfp8-32", "nvfp4-16", "iq4_nl-32",
)]  # fmt: skip
# Gate and up in the first, down in the second.
TWO = [Formats(resolve(a), resolve(b)) for a, b in (("int8", "nvfp4"), ("fp8_block", "int4"), ("q4_0", "bf16"))]
OPTIONS = {
    **{kind: Activation(kind) for kind in KINDS},
    "gpt-oss": Activation("silu", alpha=1.702, limit=1.0, up_offset=1.0),
    "limited gelu": Activation("gelu_tanh", limit=0.5),
}
ROUNDING = 2**-8  # of one value, to bfloat16, that was computed in float32 in another order


@pytest.fixture
def kernels(monkeypatch):
    """They are used. In the interpreter, which takes as long for a program whatever its size, few are enough."""
    from coterie.gpu.kernels import dequantise, few

    monkeypatch.setattr(fast, "usable", lambda device: True)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(dequantise, "ROWS", 128)
        monkeypatch.setattr(few, "SINGLE", (128, 64, 4))
        monkeypatch.setattr(few, "TOGETHER", (128, 64, 4))
    monkeypatch.setattr(few, "SINGLE_SLOTS", 4)


def matrices_of(spec, count, shape):
    experts = Experts.pack(None, torch.randn(count, *shape), torch.randn(count, *shape[::-1]), **options(spec))
    size = spec.matrix_nbytes(*shape)
    data = torch.stack([experts.packed(e)[:size] for e in range(count)])
    return unpacked(spec, *shape, data.to(DEVICE))


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_dequantise(spec, kernels):
    """To the bit, into a part of what is there."""
    from coterie.gpu.kernels.dequantise import dequantise

    for shape in matrix_shapes(spec)[: None if DEVICE.type == "cuda" else 2]:
        matrices = matrices_of(spec, 3, shape)
        index = torch.tensor([2, 0], device=DEVICE)
        expected = torch.empty(2, *shape, dtype=torch.bfloat16, device=DEVICE)
        matrices.dense(index, expected)
        out = torch.full((2, shape[0] + 3, shape[1] + 8), 7, dtype=torch.bfloat16, device=DEVICE)
        dequantise(matrices, index, out[:, 2:-1, :-8])
        assert torch.equal(out[:, 2:-1, :-8], expected)
        out[:, 2:-1, :-8] = 7
        assert (out == 7).all()


@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("activation", OPTIONS.values(), ids=OPTIONS)
def test_activation_and_its_gradient(activation, has_gate, kernels):
    """Against float64, at a number of rows and columns that no program's tile divides."""
    before = (2 * torch.randn(37, 300 * (1 + has_gate))).bfloat16()
    back, weights = torch.randn(37, 300).bfloat16(), torch.rand(37)
    exact = before.double().requires_grad_(), weights.double().requires_grad_()
    hidden = rows._hidden(activation, exact[0], has_gate) * exact[1][:, None]
    expected = torch.autograd.grad(hidden, exact, back.double())
    given = before.to(DEVICE), weights.to(DEVICE)
    found = rows.activated(activation, *given, has_gate, 3)
    assert (found.cpu()[:, :-3] - hidden).abs().max() <= ROUNDING * hidden.abs().max()
    slope, own, again = rows.slope(activation, given[0], back.to(DEVICE), given[1], has_gate, 5, True)
    assert relative(slope.cpu()[:, :-5], expected[0]) < ROUNDING / 2
    assert relative(own.cpu(), expected[1]) < 1e-5 and torch.equal(again, found[:, :-3])


def test_sums_of_slots(kernels):
    values = torch.randn(12, 1500).bfloat16().to(DEVICE)
    place = torch.randperm(12).view(4, 3).to(DEVICE)
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        found = rows.combined(values, place, dtype)
        expected = values[place[:, 0]].float() + values[place[:, 1]].float() + values[place[:, 2]].float()
        assert torch.equal(found, expected.to(dtype))
    assert rows.combined(values[:0], place[:0], torch.float32).shape == (0, 1500)


@pytest.mark.parametrize("rank", [8, 24])
def test_gram_of_tokens_where_they_are(rank, kernels):
    """Experts without rows among them; rows beyond the last are not looked at."""
    tokens, index = torch.randn(30, 200 + rank).bfloat16(), torch.randint(30, (150,))
    a, ends = torch.randn(150, rank).bfloat16(), torch.tensor([0, 70, 70, 135], dtype=torch.int32)
    found = products.gathered_gram(*on_device(a, tokens, index, ends)).cpu().double()
    for e, (start, end) in enumerate([(0, 0), (0, 70), (70, 70), (70, 135)]):
        expected = a[start:end].double().T @ tokens[index[start:end], :200].double()
        assert (found[e] - expected).abs().max() <= ROUNDING * expected.abs().max()


def moved(spec, sizes=SIZES, has_gate=True, experts=None, **more):
    found = Experts.pack(*dense(sizes, has_gate), format=spec, **more)
    found.activations = "bf16" if spec.int8_activations else "auto"
    truth = found.dequantize()
    found.move(DEVICE, experts)
    return found, truth


def on_device(*tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("spec", [*FEW, *TWO], ids=name_of)
def test_few_tokens(spec, kernels):
    """One, whose slots are computed each for itself; and some, whose experts are."""
    sizes = (3, 128, 128)
    experts, truth = moved(spec, sizes)
    for tokens in (1, 9):
        x, ids, weights, _ = random_batch(sizes, 2, tokens)
        found = experts(*on_device(x, ids, weights)).cpu()
        assert relative(found, reference.forward(x, ids, weights, *truth)) < TOLERANCE, tokens


@pytest.mark.parametrize("has_gate", [True, False], ids=["gate", "no gate"])
@pytest.mark.parametrize("tokens", [2, 18])
def test_few_tokens_with_biases(tokens, has_gate, kernels):
    """18 of one expert are more than are computed at once."""
    sizes = (3, 64, 128)
    activation = Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0)
    biases = {"up_bias": torch.randn(3, 128), "down_bias": torch.randn(3, 64)}
    biases |= {"gate_bias": torch.randn(3, 128)} if has_gate else {}
    experts, truth = moved(FORMATS[6], sizes, has_gate, activation=activation, **biases)
    x, ids, weights, _ = random_batch(sizes, 2, tokens)
    for chosen in (ids, torch.full_like(ids, 2).where(torch.arange(2) < 1, -1)):
        found = experts(*on_device(x, chosen, weights)).cpu()
        assert relative(found, reference.forward(x, chosen, weights, *truth, activation, **biases)) < TOLERANCE


@pytest.mark.parametrize("spec", [FORMATS[6]], ids=name_of)
@pytest.mark.parametrize("pieces", [False, True], ids=["one piece", "pieces"])
def test_gradients(spec, pieces, kernels, monkeypatch):
    if pieces:
        monkeypatch.setattr(resident, "PIECE_NBYTES", 2 * 3 * 2 * SIZES[1] * SIZES[2])
        monkeypatch.setattr(resident, "PIECE_SHARE", 0)
    experts, truth = moved(spec)
    x, ids, weights, grad = random_batch(SIZES, 2, 20)
    lora = random_lora(SIZES, 4, torch.float32)
    expected = gradients(
        lambda x, w, lora: reference.forward(x, ids, w, *truth, lora=lora), x, weights, lora, grad, torch.float32
    )
    x, weights, grad, ids = on_device(x, weights, grad, ids)
    lora = {name: factor.to(DEVICE) for name, factor in lora.items()}
    found = gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, lora, grad)
    for name, value in found.items():
        assert relative(value.cpu(), expected[name]) < TOLERANCE, name
