"""What reaches the engine: plain CPU tensors alone, whatever torch's defaults are; operators torch can trust."""

from __future__ import annotations

import contextlib
from typing import ClassVar

import pytest
import torch
from engine_cases import FORMATS, Batch, dense, made_of, name_of, options
from gradient_cases import gradients, random_batch, random_lora
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from coterie import ExpertLora, Experts
from coterie.border import COMPUTED, address
from coterie.errors import ArgumentError

SIZES = (4, 64, 96)
SPECS = [FORMATS[0], FORMATS[1], FORMATS[6]]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: default_device("meta"),
    "with meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_torchs_defaults_change_nothing(spec, default, tmp_path):
    """Packing, biases, computing, training, dequantising, writing and reading."""
    count, hidden, intermediate = SIZES
    random = torch.Generator().manual_seed(0)
    up_bias = torch.randn(count, intermediate, generator=random)
    down_bias = torch.randn(count, hidden, generator=random)
    weights, batch, inputs = dense(SIZES), random_batch(SIZES, 2, 9), Batch(9, 2).tensors(SIZES)
    lora = random_lora(SIZES, 4, torch.float32)

    def results(path):
        experts = Experts.pack(*weights, **options(spec), up_bias=up_bias, down_bias=down_bias)
        experts.save(path, 0)
        found = [experts(*inputs), *(m for m in experts.dequantize() if m is not None), *experts.biases().values()]
        x, ids, w, grad = batch
        trained = gradients(lambda x, w, adapter: experts(x, ids, w, lora=adapter), x, w, lora, grad)
        again = [Experts.open(path, 0, mmap=mmap)(*inputs) for mmap in (False, True)]
        return [*found, *trained.values(), *again]

    expected = results(tmp_path / "plain")
    with DEFAULTS[default]():
        found = results(tmp_path / "other")
    assert all(a.dtype == b.dtype and a.device == b.device for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Wrapper(torch.Tensor):
    """A tensor without storage, which answers for itself."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device="cpu")

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.name())
        args, kwargs = torch.utils._pytree.tree_map_only(Wrapper, lambda w: w.inner, (args, kwargs or {}))
        return func(*args, **kwargs)


class Named(torch.Tensor):
    """A subclass that is a tensor like any other."""


@pytest.fixture
def experts():
    return Experts.pack(*dense(SIZES), format="int8")


def test_fake_tensors_have_shapes_and_no_memory(experts):
    x, ids, weights = Batch(5, 2).tensors(SIZES)
    lora = ExpertLora(**random_lora(SIZES, 4, torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (x.bfloat16(), ids, weights)]
        adapters = ExpertLora(*(mode.from_tensor(f) for f in lora.factors()))
        for found in (experts(*fake), experts(*fake, lora=adapters), experts(fake[0].requires_grad_(), *fake[1:])):
            assert isinstance(found, FakeTensor) and found.shape == x.shape and found.dtype == torch.bfloat16


def test_a_wrapper_without_storage_answers_for_itself(experts):
    x, ids, weights = Batch(5, 2).tensors(SIZES)
    Wrapper.seen.clear()
    assert torch.equal(experts(Wrapper(x), ids, weights), experts(x, ids, weights))
    assert torch.equal(experts(x, ids, Wrapper(weights)), experts(x, ids, weights))
    assert Wrapper.seen == ["coterie::experts_forward"] * 2


def test_a_plain_subclass_is_a_tensor_like_any_other(experts):
    x, ids, weights = Batch(5, 2).tensors(SIZES)
    assert torch.equal(experts(x.as_subclass(Named), ids, weights).as_subclass(torch.Tensor), experts(x, ids, weights))
    parameter = torch.nn.Parameter(x)
    with torch.no_grad():
        assert torch.equal(experts(parameter, ids, weights), experts(x, ids, weights))


def test_a_view_that_is_negated_lazily(experts):
    x, ids, weights = Batch(5, 2).tensors(SIZES)
    negated = torch.complex(torch.zeros_like(x), x).conj().imag
    assert negated.is_neg()
    assert torch.equal(experts(negated, ids, weights), experts(-x, ids, weights))


def test_traces_record_the_operator(experts):
    inputs = Batch(5, 2).tensors(SIZES)
    graph = make_fx(lambda *given: experts(*given))(*inputs)
    assert torch.ops.coterie.experts_forward.default in [node.target for node in graph.graph.nodes]
    others = Batch(5, 1).tensors(SIZES)[0], *inputs[1:]
    assert torch.equal(graph(*others), experts(*others))
    traced = torch.jit.trace(lambda *given: experts(*given), inputs, check_trace=False)
    assert torch.equal(traced(*others), experts(*others))


@pytest.mark.parametrize("wrap", [Wrapper, lambda t: t.to("meta"), lambda t: FakeTensorMode().from_tensor(t)])
def test_weights_must_be_plain(wrap):
    gate, up, down = dense(SIZES)
    experts = Experts.pack(gate, up, down, format="int8")
    with pytest.raises(ArgumentError, match="up: expected a CPU tensor, found"):
        Experts.pack(gate, wrap(up), down)
    with pytest.raises(ArgumentError, match="up_bias: expected a plain float tensor on the CPU, found"):
        Experts.pack(gate, up, down, up_bias=wrap(torch.zeros(4, 96)))
    with pytest.raises(ArgumentError, match="expert 0: expected a plain CPU tensor"):
        made_of(FORMATS[1], SIZES, lambda _: wrap(experts.packed(0)))


def freed() -> torch.Tensor:
    tensor = torch.ones(3, 4)
    tensor.untyped_storage().resize_(0)
    return tensor


REFUSED = {
    "meta": (torch.ones(3, 4, device="meta"), "expected a plain CPU tensor, found Tensor on meta"),
    "wrapper": (Wrapper(torch.ones(3, 4)), "expected a plain CPU tensor, found Wrapper"),
    "sparse": (torch.ones(3, 4).to_sparse(), "expected a plain CPU tensor"),
    "negated": (torch.complex(torch.ones(3, 4), torch.ones(3, 4)).conj().imag, "expected a plain CPU tensor"),
    "dtype": (torch.ones(3, 4).double(), "found torch.float64"),
    "shape": (torch.ones(3, 5), r"expected shape \[3, 4\], found \[3, 5\]"),
    "columns apart": (torch.ones(4, 3).T, "expected values adjacent in memory"),
    "freed": (freed(), "was given back"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_address_of(case):
    tensor, message = REFUSED[case]
    with pytest.raises(ArgumentError, match=message):
        address("x", tensor, COMPUTED, (3, 4))


def test_rows_may_lie_apart_where_that_is_said():
    apart = torch.ones(3, 8)[:, :4]
    assert address("x", apart, COMPUTED, (3, 4), rows_apart=True) == apart.data_ptr()
    with pytest.raises(ArgumentError, match="adjacent"):
        address("x", apart, COMPUTED, (3, 4))


# --- the operators, called as torch calls them ---


@pytest.fixture
def arguments(experts):
    """(x, ids, weights, handle, factors, scalings, shared)"""
    x, ids, weights = (t.contiguous() for t in Batch(5, 2).tensors(SIZES))
    factors = list(random_lora(SIZES, 4, torch.float32).values())
    return x, ids, weights, experts._handle, factors, [2.0, 2.0, 2.0], False


@pytest.mark.parametrize("adapted", [True, False])
def test_opcheck_of_the_forward(experts, arguments, adapted):
    x, ids, weights, handle, factors, scalings, shared = arguments
    given = factors if adapted else [None] * 6
    torch.library.opcheck(
        torch.ops.coterie.experts_forward.default, (x, ids, weights, handle, *given, scalings, shared)
    )


@pytest.mark.parametrize("shared", [True, False])
def test_opcheck_of_training(experts, arguments, shared):
    x, ids, weights, handle, factors, scalings, _ = arguments
    factors = [f.requires_grad_() for f in factors]
    if shared:
        factors[2] = None
    torch.library.opcheck(
        torch.ops.coterie.experts_train.default,
        (x.requires_grad_(), ids, weights.requires_grad_(), handle, *factors, scalings, shared, SIZES[2], True),
    )


def test_opcheck_of_the_backward(experts, arguments):
    x, ids, weights, handle, factors, scalings, shared = arguments
    out, gate, up = torch.ops.coterie.experts_train(
        x, ids, weights, handle, *factors, scalings, shared, SIZES[2], True
    )
    torch.library.opcheck(
        torch.ops.coterie.experts_backward.default,
        (torch.ones_like(out), x, ids, weights, gate, up, handle, *factors, scalings, shared, [True] * 6),
    )


def test_operators_check_what_they_are_given(experts, arguments):
    x, ids, weights, handle, factors, scalings, shared = arguments
    rest = (*factors, scalings, shared)
    small = [f[:, :1].contiguous() for f in factors]
    cases = [
        (x[:, :32], ids, weights, handle, *rest),
        (x.double(), ids, weights, handle, *rest),
        (x, ids[:3], weights, handle, *rest),
        (x, ids, weights[:, :1], handle, *rest),
        (x, ids, weights, handle, factors[0], small[1], *factors[2:], scalings, shared),
        (x, ids + 4, weights, handle, *rest),
    ]
    for case in cases:
        with pytest.raises(ArgumentError):
            torch.ops.coterie.experts_forward(*case)
    with pytest.raises(ArgumentError):
        torch.ops.coterie.experts_train(x, ids, weights, handle, *rest, 32, True)
    with pytest.raises(ArgumentError):
        torch.ops.coterie.experts_train(x, ids, weights, handle, *rest, SIZES[2], False)
