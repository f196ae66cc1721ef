"""Layers of random experts in every format, batches for them, and what the engine must answer, to a tight tolerance."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie import Experts, reference
from coterie.activations import Activation
from coterie.formats import Format

ACTIVATION_GROUP = 256  # columns of an activation that share one int8 scale
BF16_ACTIVATIONS = ("avx512_bf16", "amx", "amx_emulated")  # the others compute bf16 weights with float32 activations

FORMATS = (
    Format("bf16"),
    *(Format("int8", group) for group in (0, 32, 64, 128)),
    *(Format("int4", group, zero) for zero in (False, True) for group in (0, 32, 64, 128)),
)


def name_of(spec: Format) -> str:
    return f"{spec.name}-{spec.group_size or 'row'}{'-zero' if spec.zero_point else ''}"


def options(spec: Format) -> dict:
    """The arguments of Experts.pack that ask for this format."""
    return {"format": spec.name, "group_size": spec.group_size, "zero_point": spec.zero_point}


@functools.cache
def dense(sizes: tuple[int, int, int], has_gate: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
    """gate, up [E,I,H] and down [E,H,I] of (E, H, I), float32."""
    count, hidden, intermediate = sizes
    random = torch.Generator().manual_seed(sum(sizes))
    gate, up = torch.randn(2, count, intermediate, hidden, generator=random) / hidden**0.5
    down = torch.randn(count, hidden, intermediate, generator=random) / intermediate**0.5
    return gate if has_gate else None, up, down


@functools.cache
def packed(spec: Format, sizes: tuple[int, int, int]) -> Experts:
    return Experts.pack(*dense(sizes), **options(spec))


@functools.cache
def dequantized(spec: Format, sizes: tuple[int, int, int]) -> tuple[Tensor | None, Tensor, Tensor]:
    return packed(spec, sizes).dequantize()


@dataclass(frozen=True)
class Batch:
    """A reproducible batch: ``spread`` False sends every token to expert 0 (and its duplicates, where K > 1)."""

    tokens: int
    top_k: int
    spread: bool = True

    def tensors(self, sizes: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
        count, hidden, _ = sizes
        random = torch.Generator().manual_seed(self.tokens * 31 + self.top_k)
        x = torch.randn(self.tokens, hidden, generator=random).bfloat16().float()
        ids = torch.zeros(self.tokens, self.top_k, dtype=torch.int64)
        if self.spread:
            ids = torch.rand(self.tokens, count, generator=random).argsort(1)[:, : self.top_k]
        return x, ids, torch.rand(self.tokens, self.top_k, generator=random) + 0.1


def int8_grid(x: Tensor) -> Tensor:
    """Rows rounded to int8 codes with a scale per activation group, as values, by the engine's operations."""
    cols = x.shape[1]
    padded = torch.nn.functional.pad(x, (0, -cols % ACTIVATION_GROUP)).unflatten(1, (-1, ACTIVATION_GROUP))
    most = padded.abs().amax(-1, keepdim=True)
    inverse = torch.tensor(127.0) / most.clamp(min=1e-30)  # 127 / most would be most.reciprocal() * 127: other ties
    codes = (padded * inverse).round()
    return (codes * (most / 127)).flatten(1)[:, :cols]


def engine_truth(
    spec: Format,
    isa: str,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    activation: Activation = Activation(),  # noqa: B008
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """reference.forward with activations rounded where the engine rounds them: what is left is the order of sums."""

    def rounded(v: Tensor) -> Tensor:
        if spec.name == "bf16":
            return v.bfloat16().float() if isa in BF16_ACTIVATIONS else v
        return int8_grid(v)

    x, out = rounded(x.float()), torch.zeros(x.shape)
    for e in range(up.shape[0]):
        t, k = (ids == e).nonzero(as_tuple=True)
        if not len(t):
            continue

        def linear(v: Tensor, weight: Tensor, bias: Tensor | None, e: int = e) -> Tensor:
            return torch.nn.functional.linear(v, weight[e], None if bias is None else bias[e])

        g = None if gate is None else linear(x[t], gate, gate_bias)
        hidden = reference.act(activation, g, linear(x[t], up, up_bias))
        if spec.name != "bf16":
            hidden = hidden.bfloat16().float()
        y = linear(rounded(hidden), down, down_bias)
        out = out.index_add(0, t, y * weights[t, k, None].float())
    return out


def token_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Relative error of each token; one near zero is measured against the typical token."""
    found, expected = found.double(), expected.double()
    norms = expected.norm(dim=1)
    return (found - expected).norm(dim=1) / torch.maximum(norms, norms.square().mean().sqrt().clamp(min=1e-30))


def assert_close(spec: Format, found: Tensor, truth: Tensor, case: object = None) -> None:
    """``found`` is what the engine must answer; ``truth`` from engine_truth.

    A sum in another order moves a hidden activation across a rounding boundary now and then. That is one bf16 step, or,
    where it is the largest of its group, another scale and so other int8 codes for the group: a few tokens differ in
    the third digit, the typical token in the seventh. From 16 rows on, and in AMX's tiles, grouped int4 is decoded to
    int8 first: a second rounding, of about a sixth of int4's own.
    """
    if not found.numel():
        return
    errors = token_errors(found, truth)
    decoded = spec.name == "int4" and spec.group_size > 0
    worst, typical = (6e-2, 4e-2) if decoded else (2e-3, 1e-5) if spec.name == "bf16" else (2e-2, 1e-5)
    assert errors.max() < worst, (case, errors.max())
    assert len(errors) < 5 or errors.median() < typical, (case, errors.median())
