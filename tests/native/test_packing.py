"""Packing: the grid of the reference, better with scale search, the same on every instruction set."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, dense, name_of, options
from streams import matrix_of

from coterie import Experts, cpu, reference

SIZES = (1, 384, 48)


def pack_up(spec, weight, **given):
    rows, cols = weight.shape
    experts = Experts.empty(1, cols, rows, **options(spec), has_gate=False)
    experts.pack_projection("up", 0, weight, **given)
    return experts


def bytes_of(experts):
    return matrix_of(experts, "up", 0).clone()


def weight_of(spec, rows=None, cols=384, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows or max(spec.group_size, 37 if not spec.group_size else 0), cols, generator=random)


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_without_search_the_grid_is_the_reference(isa, spec):
    weight = weight_of(spec)
    found = pack_up(spec, weight, scale_search=False).dequantize_projection("up", 0)
    assert torch.equal(found, reference.quantise(weight, spec))


@pytest.mark.parametrize("spec", FORMATS[1:], ids=name_of)
def test_search_never_raises_the_squared_error(isa, spec):
    """Scales are rounded to bf16 after the search, so a group may lose what a matrix gains; a matrix never loses."""
    shapes = {
        "normal": weight_of(spec),
        "heavy tails": weight_of(spec, seed=1) ** 3,
        "one outlier": weight_of(spec, seed=2).index_fill(1, torch.tensor([5]), 9.0),
        "uniform": torch.rand(weight_of(spec).shape),
        "one sign": weight_of(spec, seed=3).abs() + 1,
        "two values": weight_of(spec, seed=4).sign(),
        "few": torch.nn.functional.dropout(weight_of(spec, seed=5), 0.97),
    }
    for label, weight in shapes.items():
        plain, searched = (
            (pack_up(spec, weight, scale_search=search).dequantize_projection("up", 0) - weight).square().sum()
            for search in (False, True)
        )
        assert searched <= plain * 1.0001 + 1e-9, label


@pytest.mark.parametrize("spec", [s for s in FORMATS if s.name == "int4"], ids=name_of)
def test_search_helps_int4(spec):
    weight = weight_of(spec)
    plain, searched = (
        (pack_up(spec, weight, scale_search=search).dequantize_projection("up", 0) - weight).norm()
        for search in (False, True)
    )
    assert searched < 0.97 * plain


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_bytes_are_the_same_on_every_instruction_set(isa, spec):
    weight = weight_of(spec)
    found = {search: bytes_of(pack_up(spec, weight, scale_search=search)) for search in (False, True)}
    cpu.use_isa("scalar")
    for search, data in found.items():
        assert torch.equal(data, bytes_of(pack_up(spec, weight, scale_search=search))), search


@pytest.mark.parametrize("spec", [FORMATS[0], FORMATS[1], FORMATS[6], FORMATS[12]], ids=name_of)
def test_every_dtype_and_row_stride(isa, spec):
    rows, cols = spec.group_size or 37, 384
    wide = torch.randn(rows, 3 * cols)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        view = wide.to(dtype)[:, cols : 2 * cols]
        expected = bytes_of(pack_up(spec, view.float().contiguous()))
        assert torch.equal(bytes_of(pack_up(spec, view)), expected), dtype
    same_rows = wide[:1, :cols].expand(rows, cols)
    expected = bytes_of(pack_up(spec, same_rows.contiguous()))
    assert torch.equal(bytes_of(pack_up(spec, same_rows)), expected)


def test_half_precision_subnormals_and_extremes():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = every[every.isfinite()][: 62 * 1024].view(62, 1024)
    experts = Experts.empty(1, 1024, 62, format="bf16", has_gate=False)
    experts.pack_projection("up", 0, finite)
    assert torch.equal(experts.dequantize_projection("up", 0), finite.float().bfloat16().float())


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_padding_is_worth_nothing(isa, spec):
    """Packed bytes depend on the matrix alone: the same over memory that held something else."""
    weight = weight_of(spec)
    experts = pack_up(spec, weight)
    expected = bytes_of(experts)
    experts.pack_projection("up", 0, torch.full_like(weight, 3.0))
    experts.pack_projection("up", 0, weight)
    assert torch.equal(bytes_of(experts), expected)


def test_a_matrix_of_one_element(isa):
    for spec in (FORMATS[0], FORMATS[1], FORMATS[5], FORMATS[9]):
        experts = Experts.pack(*(torch.full((1, 1, 1), v) for v in (0.5, -2.0, 4.0)), **options(spec))
        assert [float(w) for w in experts.dequantize()] == pytest.approx([0.5, -2.0, 4.0], rel=1e-6)


def test_dense_weights_are_left_alone():
    before = [w.clone() for w in dense(SIZES)]
    Experts.pack(*dense(SIZES), format="int8")
    assert all(torch.equal(a, b) for a, b in zip(before, dense(SIZES), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_packing_says_how_far_off_it_is(isa, spec, dtype):
    weight = weight_of(spec).to(dtype)
    experts = Experts.empty(1, weight.shape[1], weight.shape[0], **options(spec), has_gate=False)
    error = experts.pack_projection("up", 0, weight)
    exact = weight.double()
    expected = (exact - experts.dequantize_projection("up", 0)).norm() / exact.norm()
    assert error == pytest.approx(float(expected), rel=1e-4, abs=1e-7)
