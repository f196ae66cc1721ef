"""Layers of random experts in every format, batches for them, and what the engine must answer, to a tight tolerance."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from streams import HALVES, floats, matrix_of, minima, take_apart
from torch import Tensor

from coterie import Experts, reference
from coterie.formats import ENCODINGS, Format, Formats

ACTIVATION_GROUP = 256  # columns of an activation that share one int8 scale
BF16_ACTIVATIONS = ("avx512_bf16", "amx", "amx_emulated")  # the others compute bf16 weights with float32 activations
TILES = ("amx", "amx_emulated")
DECODED_FROM = 24  # rows of an expert from which 4-bit groups are decoded to int8
TILES_FROM = 8  # from which AMX computes bf16 in tiles
# Codes as whole numbers: the largest magnitude, and what one is worth.
LARGEST = {"int4": 8.0, "q4_0": 8.0, "iq4_nl": 127.0, "mxfp4": 12.0, "nvfp4": 12.0, "q6_k": 32.0, "q5_0": 16.0,
           "iq4_xs": 127.0, "q3_k": 4.0}
UNITS = {"mxfp4": 0.5, "nvfp4": 0.5}
TILE_ROWS = {"scalar": 4}  # rows, else 6, up to which other weights are not decoded to bf16

FORMATS = (
    Format("bf16"),
    *(Format("int8", group) for group in (0, 32, 64, 128)),
    *(Format("int4", group, zero) for zero in (False, True) for group in (0, 32, 64, 128)),
    *(Format(name, ENCODINGS[name].group_sizes[0]) for name in list(ENCODINGS)[3:]),
)


def name_of(spec: Format | Formats) -> str:
    if isinstance(spec, Formats):
        return f"{name_of(spec.gate_up)}+{name_of(spec.down)}"
    return f"{spec.name}-{spec.group_size or 'row'}{'-zero' if spec.zero_point else ''}"


def options(spec: Format) -> dict:
    """The arguments of Experts.pack that ask for this format."""
    return {"format": spec.name, "group_size": spec.group_size, "zero_point": spec.zero_point}


def matrix_shapes(spec: Format) -> list[tuple[int, int]]:
    """Rows and columns of matrices whose last block is narrow, where the groups of both directions allow it."""
    free = not spec.group_size or spec.encoding.pads
    rows = (1, 70, 130) if free else (spec.group_size, 5 * spec.group_size, 7 * spec.group_size)
    return list(zip(rows, (128, 256, 384), strict=True))


@functools.cache
def dense(sizes: tuple[int, int, int], has_gate: bool = True) -> tuple[Tensor | None, Tensor, Tensor]:
    """gate, up [E,I,H] and down [E,H,I] of (E, H, I), float32."""
    count, hidden, intermediate = sizes
    random = torch.Generator().manual_seed(sum(sizes))
    gate, up = torch.randn(2, count, intermediate, hidden, generator=random) / hidden**0.5
    down = torch.randn(count, hidden, intermediate, generator=random) / intermediate**0.5
    return gate if has_gate else None, up, down


@functools.cache
def _packed(spec: Format, sizes: tuple[int, int, int]) -> Experts:
    return Experts.pack(*dense(sizes), **options(spec))


def packed(spec: Format, sizes: tuple[int, int, int]) -> Experts:
    """Packed once, and given out as if never trained."""
    experts = _packed(spec, sizes)
    experts.activations = "auto"
    return experts


def made_of(spec: Format, sizes: tuple[int, int, int], get: Callable[[int], Tensor]) -> Experts:
    """Experts over packed bytes that lie where `get(expert)` says, as over those of a memory map."""
    experts = Experts(*sizes, spec)
    for e in range(sizes[0]):
        experts._set_weights(e, get(e))
    return experts


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


@functools.lru_cache(maxsize=64)
def decoded(experts: Experts, name: str) -> Tensor:
    """Grouped weights of fewer than 8 bits as the engine multiplies them by many rows: codes times the ratio of their
    group's scale to the largest of 256 columns of the row, rounded to int8."""
    spec = experts.formats[name]
    unit = UNITS.get(spec.name, 1.0)
    if spec.encoding.record and HALVES[spec.name] > 1:
        return torch.stack([decoded_with_minima(experts, name, e) for e in range(experts.num_experts)])
    steps = torch.tensor(15.0 if spec.zero_point else LARGEST[spec.name]) / 127
    width = spec.scale_columns
    rows, cols = experts.shape(name)
    matrices = []
    for e in range(experts.num_experts):
        parts = take_apart(spec, rows, cols, matrix_of(experts, name, e))
        scale, row_scale = floats(spec, parts), parts.row_scale
        assert scale is not None
        per = ACTIVATION_GROUP // width
        scale = torch.nn.functional.pad(scale, (0, -scale.shape[1] % per)).unflatten(1, (-1, per))
        step = scale.abs().amax(-1, keepdim=True) * steps
        inverse = torch.where(step > 0, 128 / step, 0)
        ratio = (scale * inverse).round()
        ratio = ratio.flatten(1)[:, : -(-cols // width), None]
        scale = scale.flatten(1)[:, : -(-cols // width), None]
        values = torch.nn.functional.pad(experts.dequantize_projection(name, e), (0, -cols % width))
        values = values.unflatten(1, (-1, width))
        if row_scale is not None:
            values = torch.where(row_scale[:, None, None] != 0, values / row_scale[:, None, None], 0)
        codes = torch.where(scale != 0, values / scale / unit, 0).round()
        step = step.expand(-1, -1, per).flatten(1)[:, : -(-cols // width), None] * unit
        matrix = (((codes * ratio + 64) / 128).floor() * step).flatten(1)[:, :cols]
        matrices.append(matrix if row_scale is None else matrix * row_scale[:, None])
    return torch.stack(matrices)


def decoded_with_minima(experts: Experts, name: str, expert: int) -> Tensor:
    """The same where a minimum is taken off: it is rounded like the ratio."""
    spec, (rows, cols) = experts.formats[name], experts.shape(name)
    parts = take_apart(spec, rows, cols, matrix_of(experts, name, expert))
    per = ACTIVATION_GROUP // spec.scale_columns
    scale, minimum = (
        torch.nn.functional.pad(v, (0, -v.shape[1] % per)).unflatten(1, (-1, per))
        for v in (floats(spec, parts), minima(spec, parts))
    )
    most = torch.maximum(minimum.abs(), (scale * (2**spec.encoding.bits - 1) - minimum).abs()).amax(-1, keepdim=True)
    step = most / 127
    inverse = torch.where(step > 0, 128 / step, 0)

    def columns(v: Tensor) -> Tensor:
        return v.expand_as(scale).flatten(1).repeat_interleave(spec.scale_columns, 1)[:, :cols]

    whole = parts.codes * columns((scale * inverse).round()) - columns((minimum * inverse).round())
    return ((whole + 64) / 128).floor() * columns(step)


def stays_narrow(spec: Format, isa: str) -> bool:
    """Whether codes of few bits are multiplied as they are for any number of rows: where sums of 16 bits hold their
    products and scales are rare."""
    return isa in ("avx2", "avx512") and spec.scale_columns >= 32 and not spec.name.startswith("iq4")


def rounds_weights(spec: Format, isa: str, rows: int) -> bool:
    """Whether bf16 activations of so many rows of an expert meet weights rounded to bf16: decoded ones are, but for
    those whose scales, one a row or one for 128 columns, are applied to the products."""
    if spec.zero_point:
        return True
    if rows <= TILE_ROWS.get(isa, 6):
        return False
    keeps_scales = spec.group_size == 0 or spec.encoding.tile_rows == 128
    return not keeps_scales or (isa in TILES and rows >= TILES_FROM)


@functools.lru_cache(maxsize=64)
def dense_of(experts: Experts) -> dict[str, Tensor]:
    return {name: w for name, w in zip(("gate", "up", "down"), experts.dequantize(), strict=True) if w is not None}


def engine_truth(experts: Experts, isa: str, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """reference.forward with activations and weights rounded where the engine rounds them: what is left is the order of
    sums."""
    biases, integer = experts.biases(), experts.formats.int8_activations

    def rounded(v: Tensor) -> Tensor:
        if integer:
            return int8_grid(v)
        return v.bfloat16().float() if isa in BF16_ACTIVATIONS else v

    x, out = rounded(x.float()), torch.zeros(x.shape)
    for e in range(experts.num_experts):
        t, k = (ids == e).nonzero(as_tuple=True)
        if not len(t):
            continue

        def linear(name: str, v: Tensor, e: int = e) -> Tensor:
            spec, matrix = experts.formats[name], dense_of(experts)[name][e]
            narrow = spec.encoding.bits < 8 and spec.group_size and not stays_narrow(spec, isa)
            if integer and narrow and len(v) >= DECODED_FROM:
                matrix = decoded(experts, name)[e]
            if not integer and rounds_weights(spec, isa, len(v)):
                matrix = matrix.bfloat16().float()
            return torch.nn.functional.linear(v, matrix, biases[name][e] if name in biases else None)

        gate = linear("gate", x[t]) if experts.has_gate else None
        hidden = reference.act(experts.activation, gate, linear("up", x[t]))
        if integer:
            hidden = hidden.bfloat16().float()
        out = out.index_add(0, t, linear("down", rounded(hidden)) * weights[t, k, None].float())
    return out


def token_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Relative error of each token; one near zero is measured against the typical token."""
    found, expected = found.double(), expected.double()
    norms = expected.norm(dim=1)
    return (found - expected).norm(dim=1) / torch.maximum(norms, norms.square().mean().sqrt().clamp(min=1e-30))


def assert_close(spec: Format | Formats, found: Tensor, truth: Tensor, case: object = None) -> None:
    """``found`` is what the engine must answer; ``truth`` from engine_truth.

    A sum in another order moves a hidden activation across a rounding boundary now and then. That is one bf16 step, or,
    where it is the largest of its group, another scale and so other int8 codes for the group: a few tokens differ in
    the third digit, the typical token in the seventh.
    """
    if not found.numel():
        return
    errors = token_errors(found, truth)
    assert errors.max() < (2e-2 if spec.int8_activations else 2e-3), (case, errors.max())
    assert len(errors) < 5 or errors.median() < 1e-5, (case, errors.median())
