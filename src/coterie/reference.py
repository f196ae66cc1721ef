"""The experts in plain torch, float32: the truth that every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .activations import Activation
from .formats import E2M1, IQ4, Format, Record
from .lora import ExpertLora

_Factors = tuple[Tensor | None, Tensor | None, float]


def act(activation: Activation, gate: Tensor | None, up: Tensor) -> Tensor:
    """``act(gate) * (up + up_offset)``, or ``act(up)`` where ``gate`` is None."""
    x = up if gate is None else gate
    if activation.limit > 0 and gate is not None:
        x = x.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit)
    kinds = {
        "silu": lambda v: v * torch.sigmoid(activation.alpha * v),
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "relu": F.relu,
        "relu2": lambda v: F.relu(v) ** 2,
    }
    y = kinds[activation.kind](x)
    return y if gate is None else y * (up + activation.up_offset)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora: _Factors, expert: int) -> Tensor:
    y = F.linear(x, weight[expert].float(), None if bias is None else bias[expert].float())
    a, b, scaling = lora
    if a is None or b is None:
        return y
    return y + scaling * (x @ a[expert].float().T) @ b[expert].float().T


def forward(
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
    lora: ExpertLora | None = None,
) -> Tensor:
    """``out[t] = sum_k weights[t,k] * down_e(act(gate_e x[t], up_e x[t]))``, ``e = ids[t,k]``; -1 adds nothing.

    With LoRA each projection is ``W x + scaling * B (A x)``. Differentiable, by torch.

    x [T,H], ids [T,K], weights [T,K], gate and up [E,I,H], down [E,H,I], biases [E,I] and [E,H] -> float32 [T,H].
    """
    x, weights = x.float(), weights.float()
    lora = lora or ExpertLora()
    gate_lora, up_lora, down_lora = ((*p, s) for p, s in zip(lora.pairs().values(), lora.scalings(), strict=True))
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        if e < 0:
            continue
        t, k = (ids == e).nonzero(as_tuple=True)
        g = None if gate is None else _linear(x[t], gate, gate_bias, gate_lora, e)
        u = _linear(x[t], up, up_bias, up_lora, e)
        y = _linear(act(activation, g, u), down, down_bias, down_lora, e)
        out = out.index_add(0, t, y * weights[t, k, None])
    return out


def quantise(w: Tensor, spec: Format) -> Tensor:
    """``w`` [N,K] rounded to a format's grid without scale search, as float32 values.

    int8: ``max|w| / 127`` per row or group. int4: the extreme value maps to code -8; with a zero point, the range
    (widened to hold 0) to 0..15. Grouped scales are rounded to bf16. fp8: ``max|w| / 448`` per row, or per tile of 128
    rows and columns. mxfp4, mxfp8: a power of two per group, by the OCP microscaling rule. nvfp4: ``max|w| / 6`` per
    group, rounded to e4m3 in units of ``max|W| / 2688``. q4_0 and q8_0: as int4 and int8, with scales rounded to f16;
    q5_0: as q4_0, the extreme value mapping to -16; iq4_nl: to -127. Formats with records: see
    :func:`_quantise_records`.
    """
    w, name = w.float(), spec.name
    if spec.encoding.record:
        return _quantise_records(w, spec, spec.encoding.record)
    if name == "bf16":
        return w.bfloat16().float()
    n, k = w.shape
    group = spec.group_size or k
    g = torch.nn.functional.pad(w, (0, -k % group)).unflatten(1, (-1, group))
    most = g.abs().amax(-1, keepdim=True)
    zero = torch.zeros_like(most)
    if name in ("int8", "q8_0"):
        scale, zero = most / 127, zero + 128
    elif name == "int4" and spec.zero_point:
        least, largest = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
        scale = (largest - least) / 15
        zero = torch.where(scale > 0, (-least / scale.clamp(min=1e-38)).round().clamp(0, 15), zero + 8)
    elif name == "q5_0":
        scale, zero = _extreme(g) / -16, zero + 16
    elif name in ("int4", "q4_0"):
        scale, zero = _extreme(g) / -8, zero + 8
    elif name == "iq4_nl":
        scale = _extreme(g) / -127
    elif name == "fp8_block":
        tiles = torch.nn.functional.pad(most, (0, 0, 0, 0, 0, -n % 128)).unflatten(0, (-1, 128)).amax(1, keepdim=True)
        scale = tiles.expand(-1, 128, -1, -1).flatten(0, 1)[:n] / 448
    elif name == "fp8_channel":
        scale = most / 448
    elif name in ("mxfp4", "mxfp8"):
        exponent = torch.frexp(most).exponent - 1 - (2 if name == "mxfp4" else 8)
        scale = torch.where(most > 0, torch.exp2(exponent.float()), 0).clamp(min=2.0**-126)
    else:
        matrix = w.abs().max() / (6 * 448)
        scale = (most / 6 / matrix).to(torch.float8_e4m3fn).float() * matrix
    if spec.group_size and spec.encoding.scales in (torch.bfloat16, torch.float16):
        scale = scale.to(spec.encoding.scales).float()
    return (_rounded(g * _inverse(scale) + zero, spec) - zero).mul(scale).flatten(1)[:, :k]


def _quantise_records(w: Tensor, spec: Format, record: Record) -> Tensor:
    """Groups of which each part has a scale, a whole number times one of the group in f16; q4_1, q5_1: f16 itself.

    q2_k, q4_k, q5_k, q4_1, q5_1: the range of a part, widened to hold 0, to all codes, above a minimum that is stored
    like the scale; the largest scale and minimum of a group are 63 of its own, of q2_k 15. q6_k: the extreme value of a
    part maps to -32, the extreme scale of a group is -128 of its own. q3_k: to -4, and -32. iq4_xs: to -127, and -32.
    """
    most = 2**spec.encoding.bits - 1
    g = torch.nn.functional.pad(w, (0, -w.shape[1] % spec.group_size))
    g = g.unflatten(1, (-1, spec.group_size // spec.scale_columns, spec.scale_columns))
    if record.numbers == 2:
        least, largest = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
        scale, minimum = (largest - least) / most, -least
        factor = 15 if spec.name == "q2_k" else 63
        scale, minimum = (_multiples(v, factor) if record.parts > 1 else v.half().float() for v in (scale, minimum))
        codes = ((g + minimum) * _inverse(scale)).round().clamp(0, most)
        values = scale * codes - minimum
    elif spec.name in ("q6_k", "q3_k"):
        middle = 2 ** (spec.encoding.bits - 1)
        scale = _multiples(_extreme(g) / -middle, -128 if spec.name == "q6_k" else -32)
        values = scale * ((g * _inverse(scale) + middle).round().clamp(0, most) - middle)
    else:
        scale = _multiples(_extreme(g) / -127, -32)
        values = scale * _rounded(g * _inverse(scale), spec)
    return values.flatten(1)[:, : w.shape[1]]


def _extreme(g: Tensor, dim: int = -1) -> Tensor:
    return g.gather(dim, g.abs().argmax(dim, keepdim=True))


def _multiples(v: Tensor, most: int) -> Tensor:
    """Whole numbers times one f16 of a group, whose extreme one is `most` times as much, [n, groups, parts, 1]."""
    unit = (_extreme(v, 2) / most).half().float()
    low, high = (most, -most - 1) if most < 0 else (0, most)
    return unit * ((v * _inverse(unit) - low).round() + low).clamp(low, high)


def _inverse(v: Tensor) -> Tensor:
    return torch.where(v != 0, 1 / v, torch.zeros_like(v))


def _rounded(x: Tensor, spec: Format) -> Tensor:
    """To the nearest value that a code stands for, ties to even codes."""
    if spec.encoding.codes == torch.float8_e4m3fn:
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    if spec.name in ("mxfp4", "nvfp4"):
        values = torch.tensor(E2M1)
        middle = (values[1:] + values[:-1]) / 2
        code = torch.bucketize(x.abs(), middle)  # ties go down ...
        code += (x.abs() == torch.cat([middle, torch.tensor([torch.inf])])[code]) & (code % 2 == 1)  # ... or to even
        return values[code].copysign(x)
    if spec.name in ("iq4_nl", "iq4_xs"):
        values = torch.tensor(IQ4)
        return values[torch.bucketize(x, (values[1:] + values[:-1]) / 2)]  # ties go down
    return x.round().clamp(spec.encoding.bits == 8, 2**spec.encoding.bits - 1)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None = None
) -> Tensor:
    """softmax(scale * q K^T) V of one token of each sequence, in float64: query [B,Q,1,D], keys [B,G,S,D],
    values [B,G,S,V], mask bool [B or 1,1,1,S], False: not looked at, sinks [Q], scores of nothing -> [B,Q,1,V]."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (t.double().repeat_interleave(group, 1) for t in (keys, values))
    scores = scale * query.double() @ keys.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(1, -1, 1, 1).expand(len(scores), -1, -1, -1)], -1)
    return scores.softmax(-1)[..., : keys.shape[2]] @ values


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, from_one: bool = False) -> Tensor:
    """x / rms(x) * weight, or times 1 + weight, over the last dimension, in float64."""
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * (weight.double() + from_one)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embeddings, in float64, of the first columns of x [B,heads,1,D], as many as cos and sin [B or 1,1,turned]
    have: each in the first half is turned against its twin in the second."""
    turned = cos.shape[-1]
    first, second = x.double()[..., :turned].chunk(2, dim=-1)
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    now = torch.cat([first, second], -1) * cos + torch.cat([-second, first], -1) * sin
    return torch.cat([now, x[..., turned:]], -1)


def delta_rule(
    query: Tensor, key: Tensor, value: Tensor, beta: Tensor, decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of the gated delta rule of linear attention (Yang et al., 2024): (output [B,H,V], the state after it).

    query and key [B,H,K], value [B,H,V], beta and decay [B,H], state [B,H,K,V].
    """
    state = state * decay[..., None, None]
    change = (value - torch.einsum("bhk,bhkv->bhv", key, state)) * beta[..., None]
    state = state + key[..., None] * change[..., None, :]
    return torch.einsum("bhk,bhkv->bhv", query, state), state
