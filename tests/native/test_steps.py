"""A decoded token's attention, and its experts, each by one call of the engine, beside the same in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import coterie
from coterie import Experts, Linear, _native, reference

HIDDEN = 96
EPSILON = 0.1
# What products leave open: activations rounded to bf16 on the way, results of bf16.
ERROR = {torch.bfloat16: 0.012, torch.float32: 0.006}


@dataclass
class Shape:
    """Of one attention, and what it has."""

    sequences: int = 1
    heads: int = 4
    shared: int = 2  # heads of keys and values
    width: int = 32
    value_width: int = 32
    turned: int = 32
    cached: int = 5
    norms: str | None = "head"  # of queries and keys: of each head, of the "whole", or None
    halved: bool = False
    input_norm: bool = True
    sinks: bool = False
    masked: bool = False
    bias: bool = False
    gated: bool = False


SHAPES = {
    "a head's norms": Shape(),
    "several sequences, masked": Shape(sequences=3, masked=True),
    "norms of all heads, biases, half of the columns turned": Shape(norms="whole", bias=True, turned=16, sequences=2),
    "no norms, sinks, half the angles": Shape(norms=None, sinks=True, halved=True, width=64, turned=64),
    "other values, no norm before": Shape(value_width=48, input_norm=False, heads=6, shared=1),
    "few columns turned, long": Shape(turned=8, cached=300, sequences=2),
    "nothing cached": Shape(cached=0, width=16, turned=16, value_width=16),
    "queries wider than the input": Shape(heads=8, shared=8, width=48, turned=48),
    "gates": Shape(gated=True, sequences=3, turned=16, masked=True),
    "gates, no norms": Shape(gated=True, norms=None, heads=6, shared=1),
}


class Attention:
    """Random weights and inputs of a shape, by the engine and in float64."""

    def __init__(self, shape: Shape, dtype: torch.dtype, format: str) -> None:
        self.shape, self.dtype = shape, dtype
        self.random = torch.Generator().manual_seed(0)
        s, q, k = shape, shape.heads * shape.width, shape.shared * shape.width
        queries, values = 2 * q if s.gated else q, s.shared * s.value_width
        sizes = [(queries, HIDDEN), (k, HIDDEN), (values, HIDDEN), (HIDDEN, s.heads * s.value_width)]
        self.linears = [
            Linear.pack(self.normal(*size) * size[1] ** -0.5, self.normal(size[0]) if s.bias else None, format=format)
            for size in sizes
        ]
        for linear in self.linears:
            linear.activations = "bf16"
        self.norm = self.normal(HIDDEN).to(dtype) if s.input_norm else None
        wide = s.norms == "whole"
        self.head_norms = [self.normal(n if wide else s.width).to(dtype) if s.norms else None for n in (q, k)]
        self.x = self.normal(s.sequences, 1, HIDDEN).to(dtype)
        angles = self.normal(s.sequences, 1, s.turned // (2 if s.halved else 1)) * 3
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        room = s.cached + 3
        self.keys = self.normal(s.sequences, s.shared, room, s.width).to(dtype)
        self.values = self.normal(s.sequences, s.shared, room, s.value_width).to(dtype)
        self.sinks = self.normal(s.heads).to(dtype) if s.sinks else None
        self.mask = None
        if s.masked:
            self.mask = torch.rand(s.sequences, 1, 1, s.cached + 1, generator=self.random) > 0.4
            self.mask[..., -1] = True

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.random)

    def engine(self):
        """What computes it: a function of x, keys and values."""
        s = self.shape
        option = (EPSILON, True, False)
        norms = [None if norm is None else option for norm in (self.norm, *self.head_norms)]
        weights, shape = (linear.weight for linear in self.linears), (s.width, s.value_width, 0.3, s.halved, s.gated)
        step = _native.AttentionStep(*weights, *norms, s.norms == "whole", *shape)
        before = self.norm, *self.head_norms, self.cos, self.sin
        return lambda x, keys, values: step(x, *before, keys, values, s.cached, self.mask, self.sinks, False, False)

    def product(self, i: int, x: Tensor) -> Tensor:
        linear = self.linears[i]
        bias = 0 if linear.bias is None else linear.bias.double()
        return x.to(torch.bfloat16).double() @ linear.dequantize().double().t() + bias

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and the keys and values that are appended."""
        s = self.shape
        x = self.x[:, 0] if self.norm is None else reference.rms_norm(self.x[:, 0], self.norm, EPSILON).to(self.dtype)
        heads, gates = [], None
        for i, norm in enumerate(self.head_norms):
            rows = self.product(i, x)
            if s.gated and i == 0:
                rows, gates = (part.flatten(1) for part in rows.view(s.sequences, s.heads, 2, -1).unbind(2))
            if norm is not None and s.norms == "whole":
                rows = reference.rms_norm(rows, norm, EPSILON)
            rows = rows.view(s.sequences, -1, 1, s.width)
            heads.append(reference.rms_norm(rows, norm, EPSILON) if norm is not None and s.norms == "head" else rows)
        twice = 2 if s.halved else 1
        query, key = (reference.turn(h, self.cos.repeat(1, 1, twice), self.sin.repeat(1, 1, twice)) for h in heads)
        value = self.product(2, x).view(s.sequences, s.shared, 1, s.value_width)
        keys = torch.cat([self.keys[:, :, : s.cached], key], 2)
        values = torch.cat([self.values[:, :, : s.cached], value], 2)
        attended = reference.attend(query, keys, values, self.mask, 0.3, self.sinks)
        attended = attended.reshape(s.sequences, -1)
        out = self.product(3, attended if gates is None else attended * gates.sigmoid())
        return (out if self.norm is None else out + self.x[:, 0].double())[:, None], key, value


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("format", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("name", SHAPES)
def test_attention(name, dtype, format, each_isa):
    case = Attention(SHAPES[name], dtype, format)
    out, key, value = case.expected()
    for isa in each_isa:
        keys, values = case.keys.clone(), case.values.clone()
        found = case.engine()(case.x, keys, values)
        at = case.shape.cached
        assert found.dtype == dtype and found.shape == case.x.shape
        assert relative(found, out) < ERROR[dtype], isa
        assert relative(keys[:, :, at : at + 1], key) < ERROR[dtype], isa
        assert relative(values[:, :, at : at + 1], value) < ERROR[dtype], isa
        for now, before in ((keys, case.keys), (values, case.values)):  # what lies before and behind it stays
            now[:, :, at] = before[:, :, at]
            assert torch.equal(now, before)


def test_the_same_bits_for_any_number_of_threads(isa, threads):
    case = Attention(SHAPES["several sequences, masked"], torch.bfloat16, "int4")
    found = []
    for count in (1, 2, 3):
        coterie.cpu.set_threads(count)
        found.append(case.engine()(case.x, case.keys.clone(), case.values.clone()))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "change",
    [
        lambda case: {"x": case.x[..., :64]},
        lambda case: {"x": case.x.double()},
        lambda case: {"x": case.x.expand(3, 1, -1)},
        lambda case: {"keys": case.keys.float()},
        lambda case: {"keys": case.keys[:, :1]},
        lambda case: {"keys": case.keys[..., :16]},
        lambda case: {"keys": case.keys[:, :, : case.shape.cached]},
        lambda case: {"values": case.values[:, :, :4]},
        lambda case: {"values": case.values.to("meta")},
        lambda case: {"cos": case.cos[..., :16]},
        lambda case: {"cos": case.cos.float()},
        lambda case: {"mask": torch.ones(1, 1, 1, case.shape.cached, dtype=torch.bool)},
        lambda case: {"mask": torch.full((1, 1, 1, case.shape.cached + 1), 0.5)},
        lambda case: {"norm": case.norm[:64]},
        lambda case: {"head_norms": [case.head_norms[0], case.head_norms[1][:16]]},
        lambda case: {"sinks": torch.zeros(3)},
    ],
)
def test_other_tensors_are_not_taken(change):
    case = Attention(Shape(), torch.bfloat16, "int8")
    given = {"x": case.x, "keys": case.keys.clone(), "values": case.values.clone()}
    assert case.engine()(**given) is not None
    for name, value in change(case).items():
        if name in given:
            given[name] = value
        else:
            setattr(case, name, value)
    before = given["keys"].clone()
    assert case.engine()(**given) is None
    assert torch.equal(given["keys"], before)


@pytest.mark.parametrize("shape", [Shape(width=24, turned=24, value_width=32), Shape(value_width=24)], ids=str)
def test_heads_that_lanes_do_not_divide_are_not_taken(shape):
    case = Attention(shape, torch.bfloat16, "int8")
    assert case.engine()(case.x, case.keys, case.values) is None


@pytest.mark.parametrize("gated", [False, True])
def test_projections_of_other_sizes_are_not_taken(gated):
    case = Attention(Shape(gated=gated), torch.bfloat16, "int8")
    whole = list(case.linears)
    rows = whole[0].out_features
    for place, size in ((0, (rows + 8, HIDDEN)), (0, (rows // 4 * 3, HIDDEN)), (3, (HIDDEN, 96)), (1, (32, HIDDEN))):
        case.linears = list(whole)
        case.linears[place] = Linear.pack(case.normal(*size))
        assert case.engine()(case.x, case.keys, case.values) is None, (place, size)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("normalised", [True, False])
def test_experts(normalised, dtype, each_isa):
    random = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    sizes = [(6, 64, HIDDEN), (6, 64, HIDDEN), (6, HIDDEN, 64)]
    experts = Experts.pack(*(normal(*size) * 0.1 for size in sizes), format="int8")
    x, norm, router = (t.to(dtype) for t in (normal(3, 1, HIDDEN), normal(HIDDEN), normal(6, HIDDEN) * 0.3))
    bias = normal(6).to(dtype)
    for isa in each_isa:
        normed = _native.rms_norm(x, norm, EPSILON, True, False)
        _, weights, ids = _native.route(normed[:, 0], router, bias, 2, normalised)
        expected = experts(normed[:, 0], ids, weights.to(torch.bfloat16).float())
        found = experts.in_ram.step(x, norm, (EPSILON, True, False), router, bias, 2, normalised, True, True)
        rounded = experts.in_ram.step(x, norm, (EPSILON, True, False), router, bias, 2, normalised, False, True)
        exact = experts(normed[:, 0], ids, weights)
        assert torch.equal(rounded[:, 0], x[:, 0] + exact), isa
        if dtype == torch.bfloat16:  # routing weights as bf16 are what models round to
            assert torch.equal(found[:, 0], x[:, 0] + expected), isa


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", ERROR)
def test_experts_chosen_by_sigmoids(dtype, wide, each_isa):
    random = torch.Generator().manual_seed(1)
    sizes = [(8, 64, HIDDEN), (8, 64, HIDDEN), (8, HIDDEN, 64)]
    experts = Experts.pack(*(torch.randn(*size, generator=random) * 0.1 for size in sizes), format="int8")
    x, norm, router = (
        torch.randn(*size, generator=random).to(dtype) for size in ((3, 1, HIDDEN), (HIDDEN,), (8, HIDDEN))
    )
    scores = torch.randn(8, generator=random), 4, 2, 2.5, wide
    for _ in each_isa:
        normed = _native.rms_norm(x, norm, EPSILON, True, False)
        logits, weights, ids = _native.route(normed[:, 0], router, None, 2, True, scores)
        assert logits.dtype == (torch.float32 if wide else dtype) and torch.allclose(weights.sum(-1), torch.tensor(2.5))
        found = experts.in_ram.step(x, norm, (EPSILON, True, False), router, None, 2, True, False, True, None, scores)
        assert torch.equal(found[:, 0], x[:, 0] + experts(normed[:, 0], ids, weights))


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("scored", [True, False])
def test_a_shared_expert(scored, dtype, each_isa):
    random = torch.Generator().manual_seed(1)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=random)

    sizes = [(6, 64, HIDDEN), (6, 64, HIDDEN), (6, HIDDEN, 64)]
    experts = Experts.pack(*(normal(*size) * 0.1 for size in sizes), format="int8")
    linears = [Linear.pack(normal(*size) * 0.1, format="q4_0") for size in ((32, HIDDEN), (32, HIDDEN), (HIDDEN, 32))]
    x, norm, router, score = (
        t.to(dtype) for t in (normal(3, 1, HIDDEN), normal(HIDDEN), normal(6, HIDDEN) * 0.3, normal(1, HIDDEN))
    )
    given = x, norm, (EPSILON, True, False), router, None, 2, True, True, True
    weights, kind = [linear.weight for linear in linears], (1, 1.0, 0.0, 0.0)  # gelu
    for isa in each_isa:
        normed = _native.rms_norm(x, norm, EPSILON, True, False)
        beside = _native.gated(*weights, normed, kind, False)
        if scored:
            beside = beside * (normed.double() @ score[0].double()).sigmoid()[..., None]
        expected = experts.in_ram.step(*given, None).double() + beside.double()
        found = experts.in_ram.step(*given, (*weights, kind, False, score if scored else None))
        assert found.dtype == dtype and relative(found, expected) < (1e-2 if dtype == torch.bfloat16 else 1e-5), isa


def test_other_shared_experts_are_not_taken():
    experts = Experts.pack(*(torch.randn(4, 32, 32) for _ in range(3)), format="int8")
    gate, up, down, narrow = (Linear.pack(torch.randn(*s)).weight for s in ((64, 32), (64, 32), (32, 64), (64, 16)))
    given = torch.randn(2, 1, 32), torch.ones(32), (0.1, True, False), torch.randn(4, 32), None, 2, True, False, False
    kind = 0, 1.0, 0.0, 0.0

    def step(gate=gate, up=up, down=down, score=None):
        return experts.in_ram.step(*given, (gate, up, down, kind, False, score))

    assert step() is not None and step(score=torch.ones(1, 32)) is not None
    for other in ({"up": narrow}, {"down": up}, {"gate": narrow, "up": narrow}, {"score": torch.ones(1, 16)}):
        assert step(**other) is None
    assert step(score=torch.ones(1, 32, dtype=torch.bfloat16)) is None and step(score=torch.ones(2, 32)) is None


def test_other_tensors_are_not_taken_by_experts():
    experts = Experts.pack(*(torch.randn(4, 32, 32) for _ in range(3)), format="int8")
    x, norm, router = torch.randn(2, 1, 32), torch.ones(32), torch.randn(4, 32)

    def step(x=x, norm=norm, router=router, bias=None, top_k=2):
        return experts.in_ram.step(x, norm, (0.1, True, False), router, bias, top_k, True, False, False)

    assert step() is not None
    for other in ({"x": x.double()}, {"x": x[..., :16]}, {"norm": norm[:16]}, {"router": router.bfloat16()}):
        assert step(**other) is None
    for other in ({"router": router[:3]}, {"router": router[:, :16]}, {"bias": torch.zeros(3)}):
        assert step(**other) is None
    assert step(top_k=0) is None and step(top_k=5) is None
