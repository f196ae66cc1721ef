"""What a call of the experts accepts, refuses, and how torch.compile sees it."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, Batch, name_of, packed

from coterie.errors import ArgumentError

SIZES = (4, 128, 256)
SPECS = [FORMATS[0], FORMATS[1], FORMATS[6]]


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_every_dtype_of_x(isa, spec):
    """bf16 and f16 outputs are the f32 output rounded once."""
    experts = packed(spec, SIZES)
    x, ids, weights = Batch(9, 2).tensors(SIZES)
    expected = experts(x, ids, weights)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(experts(x.to(dtype), ids, weights), expected.to(dtype))


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_any_strides_of_x(isa, spec, dtype):
    """Rows far apart up to the last byte of the storage, rows on top of each other, and columns apart."""
    experts = packed(spec, SIZES)
    _, ids, weights = Batch(40, 1, spread=False).tensors(SIZES)
    hidden = SIZES[1]
    views = {
        "rows apart": torch.randn(40, 5 * hidden).to(dtype)[:, 4 * hidden :],
        "one row": torch.randn(1, hidden).to(dtype).expand(40, hidden),
        "overlapping": torch.randn(40 * 8 + hidden).to(dtype).as_strided((40, hidden), (8, 1)),
        "columns apart": torch.randn(hidden, 40).to(dtype).T,
    }
    for label, x in views.items():
        assert torch.equal(experts(x, ids, weights), experts(x.contiguous(), ids, weights)), label


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_ids_and_weights_of_every_dtype_and_stride(isa, spec):
    experts = packed(spec, SIZES)
    x, ids, weights = Batch(9, 2).tensors(SIZES)
    weights = weights.bfloat16()
    expected = experts(x, ids, weights.float())
    assert torch.equal(experts(x, ids.int(), weights), expected)
    assert torch.equal(experts(x, ids.T.contiguous().T, weights.T.contiguous().T.double()), expected)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_no_expert_and_duplicates(isa, spec):
    experts = packed(spec, SIZES)
    x, _, _ = Batch(4, 1).tensors(SIZES)
    one = experts(x, torch.tensor([[1], [2], [3], [0]]), torch.ones(4, 1))
    ids = torch.tensor([[1, -1, 1], [-1, -1, 2], [-1, -1, -1], [0, 0, 0]])
    found = experts(x, ids, torch.tensor([[0.25, 9, 0.75], [9, 9, 2], [9, 9, 9], [0.5, -1, 0.5]]))
    torch.testing.assert_close(found[0], one[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1], 2 * one[1], rtol=1e-5, atol=1e-5)
    assert not found[2].any()
    torch.testing.assert_close(found[3], torch.zeros(SIZES[1]), rtol=0, atol=1e-5)


def test_nothing_to_compute(isa):
    experts = packed(FORMATS[6], SIZES)
    assert experts(torch.zeros(0, 128), torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)).shape == (0, 128)
    assert not experts(torch.ones(3, 128), torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0)).any()
    assert not experts(torch.ones(3, 128), torch.full((3, 2), -1), torch.ones(3, 2)).any()


X, IDS, WEIGHTS = torch.zeros(3, 128), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("x", "ids", "weights", "message"),
    [
        (X[:, :64], IDS, WEIGHTS, r"x: expected shape \[tokens, 128\], found \[3, 64\]"),
        (X[0], IDS, WEIGHTS, r"x: expected shape \[tokens, 128\], found \[128\]"),
        (X[None], IDS, WEIGHTS, r"x: .* found \[1, 3, 128\]"),
        (X.double(), IDS, WEIGHTS, "x: expected bfloat16, float16 or float32, found torch.float64"),
        (X.long(), IDS, WEIGHTS, "x: expected .* found torch.int64"),
        (X, IDS[:2], WEIGHTS, r"ids: expected shape \[3, experts per token\], found \[2, 2\]"),
        (X, IDS[:, 0], WEIGHTS, r"ids: .* found \[3\]"),
        (X, IDS.short(), WEIGHTS, "ids: expected int64 or int32, found torch.int16"),
        (X, IDS.float(), WEIGHTS, "ids: expected int64 or int32, found torch.float32"),
        (X, IDS.repeat(1, 3), WEIGHTS.repeat(1, 3), "ids: 6 experts per token, but there are only 4"),
        (X, IDS, WEIGHTS[:, :1], r"weights: expected the shape of ids, \[3, 2\], found \[3, 1\]"),
        (X, IDS, IDS, "weights: expected a float dtype, found torch.int64"),
        (X.to("meta"), IDS, WEIGHTS, "x: expected a CPU tensor, found meta"),
        (X, IDS.to("meta"), WEIGHTS, "ids: expected a CPU tensor, found meta"),
        (X, IDS, WEIGHTS.to("meta"), "weights: expected a CPU tensor, found meta"),
        (X, IDS + 4, WEIGHTS, r"expert id 4 of token 0 is out of range: expected -1 or 0\.\.3"),
        (X, IDS.index_fill(0, torch.tensor([2]), -2), WEIGHTS, "expert id -2 of token 2 is out of range"),
        (X, IDS + 2**40, WEIGHTS, "expert id 1099511627776 of token 0"),
    ],
)
def test_bad_input(x, ids, weights, message):
    with pytest.raises(ArgumentError, match=message):
        packed(FORMATS[1], SIZES)(x, ids, weights)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_compiles_as_one_graph(spec):
    experts = packed(spec, SIZES)

    def block(x, ids, weights):
        return torch.relu(experts(x * 2, ids, weights)) + x

    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in (Batch(5, 2), Batch(7, 2)):
        inputs = batch.tensors(SIZES)
        torch.testing.assert_close(compiled(*inputs), block(*inputs))
