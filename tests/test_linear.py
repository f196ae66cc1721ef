"""One packed matrix by itself, beside the same in plain torch."""

from __future__ import annotations

import gc

import pytest
import torch
from instruction_sets import ISAS

import coterie
from coterie import Linear
from coterie.checkpoints import Codes
from coterie.errors import ArgumentError
from coterie.formats import FORMATS, resolve

SIZES = [(64, 128), (1, 128), (200, 256), (1000, 384)]
ROWS = [1, 3, 7, 40, 300]


def made(format: str, out: int, cols: int, bias: bool = True, **options) -> Linear:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(out, cols, generator=random) * 0.05
    return Linear.pack(weight, torch.randn(out, generator=random) if bias else None, format=format, **options)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def truth(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x.float(), linear.dequantize(), linear.bias)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_shape_and_instruction_set(format, each_isa):
    cases = [(made(format, *size), inputs(rows, size[1], dtype=torch.bfloat16)) for size in SIZES for rows in ROWS]
    expected = [truth(linear, x) for linear, x in cases]
    integer = cases[0][0].spec.encoding.int8_activations
    for isa in each_isa:
        for (linear, x), y in zip(cases, expected, strict=True):
            found = linear(x)
            assert found.dtype == torch.bfloat16 and found.shape == y.shape
            # One bf16 step of the result, and, with int8 activations, half a step of 1/127 of the largest of 256
            # columns: .01 of a Gaussian's own size; decoded 4-bit codes add as much.
            assert relative(found, y) < (0.02 if integer else 0.0045), (isa, linear, len(x))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("format", FORMATS)
def test_gradients(format, isa):
    for size in SIZES:
        linear = made(format, *size)
        weight = linear.dequantize()
        for rows in ROWS:
            x = inputs(rows, size[1], dtype=torch.bfloat16).float().requires_grad_()  # kernels may round to bf16
            y = linear(x)
            grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            y.backward(grad)
            assert relative(y.detach(), torch.nn.functional.linear(x.detach(), weight, linear.bias)) < 0.0045
            assert relative(x.grad, grad @ weight) < 0.0045, (linear, rows)


def test_shapes_and_dtypes():
    linear = made("int8", 64, 128)
    x = inputs(2, 5, 128)
    y = linear(x)
    assert y.shape == (2, 5, 64) and torch.equal(y.view(10, 64), linear(x.view(10, 128)))
    assert torch.equal(linear(x.half()), linear(x.half().float()).half())
    assert torch.equal(linear(x[:, ::2]), linear(x[:, ::2].contiguous()))
    assert torch.equal(linear(x.mT.contiguous().mT), y)
    assert linear(inputs(0, 128)).shape == (0, 64)
    assert linear(x[0, 0]).shape == (64,)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_rows_that_are_not_adjacent(isa):
    linear, x = made("bf16", 64, 128), inputs(40, 256, dtype=torch.bfloat16)
    for rows in (x[:1, :128].expand(40, 128), x[:, 128:]):
        assert torch.equal(linear(rows), linear(rows.contiguous()))


def test_one_arithmetic_once_it_is_trained():
    linear = made("int8", 64, 128)
    x = inputs(4, 128)
    before = linear(x)
    trained = linear(x.clone().requires_grad_())
    assert torch.equal(linear(x), trained) and not torch.equal(before, trained)
    linear.activations = "int8"
    assert torch.equal(linear(x), before)
    with pytest.raises(ArgumentError, match="inference"):
        linear(x.clone().requires_grad_())


def test_the_weight_lives_as_long_as_its_gradients():
    linear = made("int4", 64, 128)
    dense = linear.dequantize()
    x = inputs(4, 128).requires_grad_()
    y = linear(x)
    del linear
    gc.collect()
    y.sum().backward()
    assert relative(x.grad, torch.ones(4, 64) @ dense) < 0.0045


def test_operators():
    linear = made("int8", 64, 128)
    x = inputs(5, 128)
    torch.library.opcheck(torch.ops.coterie.linear, (x.requires_grad_(), linear._handle, 64))
    torch.library.opcheck(torch.ops.coterie.linear_backward, (inputs(5, 64), linear._handle, 128))
    with pytest.raises(ArgumentError, match="packed weights that are not in this process"):
        torch.ops.coterie.linear(x, torch.tensor([1]), 64)


def test_compile():
    linear = made("int8", 64, 128)
    linear.adapt()
    x = inputs(5, 128)
    compiled = torch.compile(lambda v: linear(v) + 1, fullgraph=True)
    assert torch.equal(compiled(x), linear(x) + 1)


def codes(rows: int, cols: int) -> Codes:
    """Of int4 in groups of 32."""
    random = torch.Generator().manual_seed(0)
    scale = torch.rand(rows, cols // 32, generator=random).bfloat16() + 0.1
    return Codes(
        resolve("int4"), torch.randint(0, 16, (rows, cols), generator=random, dtype=torch.uint8), scale, None
    )


def test_codes_are_kept():
    stored = codes(80, 96)
    linear = Linear.empty(80, 96, format="int4")
    assert linear.pack_codes(stored) == 0
    expected = (stored.codes.float() - 8) * stored.scale.float().repeat_interleave(32, 1)
    assert torch.equal(linear.dequantize(), expected)


def test_a_weight_packed_later():
    weight = inputs(48, 64)
    linear = Linear.empty(48, 64, torch.ones(48), format="int8")
    assert not linear.dequantize().any()
    error = linear.pack_weight(weight)
    assert error == pytest.approx(relative(linear.dequantize(), weight), rel=1e-4)
    assert torch.equal(linear.packed, Linear.pack(weight, format="int8").packed)


def test_threads(threads):
    linear, x = made("int4", 1000, 384), inputs(40, 384)
    found = []
    for number in (1, 2, 5):
        coterie.cpu.set_threads(number)
        found.append(linear(x))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Linear.pack(torch.zeros(3)), r"float matrix \[out, in\], found torch.float32 \[3\]"),
        (lambda: Linear.pack(torch.zeros(3, 4, dtype=torch.int8)), "found torch.int8"),
        (lambda: Linear.pack(torch.zeros(3, 33), format="int4"), "not a multiple of group_size=32"),
        (lambda: Linear.pack(torch.full((3, 32), torch.nan)), "NaN or Inf"),
        (lambda: Linear.pack(torch.zeros(3, 32), format="int3"), "unknown format"),
        (lambda: Linear.empty(3, 33, format="int4"), "not a multiple of group_size=32"),
        (lambda: Linear.empty(3, 32).pack_weight(torch.zeros(3, 64)), r"weight: expected shape \[3, 32\]"),
        (lambda: Linear.empty(80, 96).pack_codes(codes(80, 96)), "codes: expected int8, found int4 in groups of 32"),
        (lambda: Linear.empty(80, 64, format="int4").pack_codes(codes(80, 96)), r"codes: expected shape \[80, 64\]"),
        (lambda: made("int8", 64, 128)(inputs(2, 64)), r"expected shape \[..., 128\], found \[2, 64\]"),
        (lambda: made("int8", 64, 128)(torch.zeros(2, 128, dtype=torch.int64)), "found torch.int64"),
        (lambda: made("int8", 64, 128)(torch.zeros(2, 128, device="meta")), "expected a CPU tensor"),
        (lambda: setattr(made("bf16", 64, 128), "activations", "int8"), "needs weights of"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ArgumentError, match=message):
        call()
