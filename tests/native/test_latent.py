"""One token's attention to latents, beside keys and values made of them in plain torch."""

from __future__ import annotations

import pytest
import torch

from coterie import Linear, _native, cpu, reference

# Sequences, heads, positions, width of a latent, of keys and values made of it, of what is cached beside it.
SHAPES = [
    (1, 16, 300, 512, 128, 128, 64),
    (2, 7, 33, 64, 24, 40, 16),
    (3, 20, 257, 96, 19, 5, 32),
    (1, 1, 1, 16, 8, 16, 48),
    (4, 12, 600, 48, 32, 16, 16),
]
ERROR = {torch.bfloat16: 0.006, torch.float32: 2e-6}


def tensors(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The query, the matrix, and latents and what is beside them with room behind their positions."""
    sequences, heads, positions, rank, key_dim, value_dim, turned = shape
    random = torch.Generator().manual_seed(positions)
    query = torch.randn(sequences, heads, 1, key_dim + turned, generator=random).to(dtype)
    weight = torch.randn(heads * (key_dim + value_dim), rank, generator=random).mul(rank**-0.5).to(dtype)
    cached = (torch.randn(sequences, 1, positions + 9, width, generator=random).to(dtype) for width in (rank, turned))
    return query, weight, *(t[:, :, :positions] for t in cached)


def attend(query, matrix, latents, turned, *options):
    """By a matrix that is packed, the rows that make keys go beside it."""
    of_keys = None
    if isinstance(matrix, Linear):
        by_head = matrix.dequantize().to(query.dtype).unflatten(0, (query.shape[1], -1))
        matrix, of_keys = matrix.weight, by_head[:, : query.shape[3] - turned.shape[3]].flatten(0, 1)
    return _native.attend_latents(query, (matrix, of_keys), latents, turned, *options)


def expected_of(query, weight, latents, turned, mask, sinks=None) -> torch.Tensor:
    """[B, 1, heads, V]."""
    heads, key_dim = query.shape[1], query.shape[3] - turned.shape[3]
    made = latents.double() @ weight.double().unflatten(0, (heads, -1)).transpose(1, 2)
    keys, values = made[..., :key_dim], made[..., key_dim:]
    keys = torch.cat([keys, turned.double().expand(-1, heads, -1, -1)], dim=-1)
    return reference.attend(query, keys, values, mask, 0.3, sinks).transpose(1, 2)


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("shape", SHAPES)
def test_beside_plain_torch(shape, dtype, each_isa):
    given = tensors(shape, dtype)
    seen = torch.rand(shape[0], 1, 1, shape[2], generator=torch.Generator().manual_seed(1)) > 0.3
    seen[..., shape[2] // 2] = True
    added = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    sinks = torch.randn(shape[1], generator=torch.Generator().manual_seed(2)).to(dtype)
    cases = [(None, None, None), (seen, seen, sinks), (added, seen, None), (seen[:1], seen[:1], None)]
    expected = [expected_of(*given, mask, sink) for _, mask, sink in cases]
    for isa in each_isa:
        for (mask, _, sink), out in zip(cases, expected, strict=True):
            found = attend(*given, mask, 0.3, sink)
            assert found.dtype == dtype and found.shape == out.shape
            assert (found - out).norm() / out.norm() < ERROR[dtype], isa


@pytest.mark.parametrize("dtype", ERROR)
@pytest.mark.parametrize("format", ["bf16", "int8", "int4", "fp8_block", "q4_k"])
@pytest.mark.parametrize("sequences", [1, 3])
def test_a_packed_matrix(sequences, format, dtype, each_isa):
    query, weight, *cached = tensors((sequences, 5, 40, 256, 64, 128, 16), dtype)
    packed = Linear.pack(weight, format=format)
    expected = expected_of(query, packed.dequantize(), *cached, None)
    for isa in each_isa:
        for integer in {False, packed.spec.int8_activations}:
            found = attend(query, packed, *cached, None, 0.3, None, integer)
            assert found.dtype == dtype and found.shape == expected.shape
            assert (found - expected).norm() / expected.norm() < (0.03 if integer else 0.008), isa


@pytest.mark.parametrize("packed", [False, True])
def test_the_same_bits_for_any_number_of_threads(packed, isa, threads):
    query, weight, *cached = tensors((1, 5, 300, 64, 64, 64, 16), torch.bfloat16)
    linear = Linear.pack(weight, format="int4")
    found = []
    for count in (1, 2, 5):
        cpu.set_threads(count)
        found.append(attend(query, linear if packed else weight, *cached, None, 0.3))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_tensors_that_do_not_fit_are_not_taken():
    query, weight, latents, turned = given = tensors((2, 4, 10, 32, 16, 16, 16), torch.float32)
    assert attend(*given, None, 1.0) is not None
    others = [
        (query.double(), weight, latents, turned),
        (query[:1], weight, latents, turned),
        (query.expand(-1, -1, 2, -1), weight, latents, turned),
        (query[..., :16], weight, latents, turned),
        (query, weight[:-1], latents, turned),
        (query, weight[:64], latents, turned),
        (query, weight[:, :16], latents, turned),
        (query, weight.bfloat16(), latents, turned),
        (query, weight, latents.bfloat16(), turned),
        (query, weight, latents[..., :16], turned),
        (query, weight, latents[:, :, :9], turned),
        (query, weight, latents.expand(-1, 2, -1, -1), turned),
        (query, weight, latents, turned[..., :8]),
        (query, weight, latents[:, :, :0], turned[:, :, :0]),
    ]
    for case in others:
        assert attend(*case, None, 1.0) is None
    assert attend(*given, torch.ones(2, 1, 1, 9, dtype=torch.bool), 1.0) is None
    assert attend(*given, None, 1.0, torch.ones(3)) is None
    for dims in ((16, 64), (64, 16), (64, 64)):  # heads of a packed matrix are whole blocks of it
        query, weight, *cached = tensors((2, 4, 10, 32, *dims, 16), torch.float32)
        found = attend(query, Linear.pack(weight), *cached, None, 1.0)
        assert (found is not None) == (dims == (64, 64))
