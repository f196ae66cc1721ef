"""Linear attention by the gated delta rule, in one call of the engine, beside the same in plain torch."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn import functional as F

from coterie import Linear, _native, cpu, reference

EPSILON = 1e-5
SHAPES = [(1, 1, 1, 16, 16), (1, 2, 6, 24, 32), (3, 4, 4, 128, 16), (2, 3, 12, 7, 128)]  # B, key heads, heads, K, V


def tensors(shape, dtype, positions, taps, bias, tokens=1):
    sequences, key_heads, heads, key_dim, value_dim = shape
    random = torch.Generator().manual_seed(0)
    channels = 2 * key_heads * key_dim + heads * value_dim

    def draw(*sizes, dtype=dtype):
        return torch.randn(sizes, generator=random).to(dtype)

    return {
        "mixed": draw(sequences, tokens, channels), "gates": draw(sequences, tokens, heads * value_dim),
        "betas": draw(sequences, tokens, heads), "steps": 3 * draw(sequences, tokens, heads),
        "window": draw(sequences, channels, positions), "convolution": draw(channels, 1, taps),
        "bias": draw(channels) if bias else None,
        "state": draw(sequences, heads, key_dim, value_dim, dtype=torch.float32), "log_rates": draw(heads),
        "step_bias": draw(heads), "norm": 1 + draw(value_dim),
    }  # fmt: skip


def by_head(given, key_heads):
    """The same inputs, those of a key head together."""
    heads, key_dim = given["state"].shape[1:3]
    width = key_heads * key_dim
    q, k, v = given["mixed"].split([width, width, given["mixed"].shape[-1] - 2 * width], -1)
    parts = [part.unflatten(-1, (key_heads, -1)) for part in (q, k, v, given["gates"])]
    both = [part.unflatten(-1, (key_heads, -1)) for part in (given["betas"], given["steps"])]
    assert heads % key_heads == 0
    mixed, betas = (torch.cat(each, -1).flatten(2).contiguous() for each in (parts, both))
    return given | {"mixed": mixed, "betas": betas, "gates": None, "steps": None}


def call(given, key_heads):
    rows = [given[name] for name in ("mixed", "gates", "betas", "steps")]
    return _native.delta_rule(*rows, own_parts(given, key_heads))


def own_parts(given, key_heads):
    names = "window", "convolution", "bias", "state", "log_rates", "step_bias", "norm"
    return (*(given[name] for name in names), EPSILON, key_heads)


def truth(given, key_heads):
    """(output, window, state) as the models compute them, in float32."""
    given = {name: value if value is None else value.float() for name, value in given.items()}
    _, heads, key_dim, value_dim = given["state"].shape
    taps, positions, tokens = given["convolution"].shape[-1], given["window"].shape[-1], given["mixed"].shape[1]
    seen = torch.cat([given["window"], given["mixed"].mT], -1)
    mixed = F.conv1d(seen[..., -taps - tokens + 1 :], given["convolution"], given["bias"], groups=seen.shape[1])
    width = key_heads * key_dim
    q, k, v = F.silu(mixed).mT.split([width, width, heads * value_dim], -1)
    q, k = (x.unflatten(-1, (key_heads, key_dim)).repeat_interleave(heads // key_heads, 2) for x in (q, k))
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    decay = (-given["log_rates"].exp() * F.softplus(given["steps"] + given["step_bias"])).exp()
    beta, values, state, outs = given["betas"].sigmoid(), v.unflatten(-1, (heads, value_dim)), given["state"], []
    for i in range(tokens):
        q_, k_, v_, beta_, decay_ = (x[:, i] for x in (q / key_dim**0.5, k, values, beta, decay))
        out, state = reference.delta_rule(q_, k_, v_, beta_, decay_, state)
        outs.append(out)
    out = torch.stack(outs, 1)
    out = reference.rms_norm(out, given["norm"], EPSILON) * F.silu(given["gates"].view_as(out))
    return out.flatten(2), seen[..., -positions:], state


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("positions", "taps", "bias"), [(4, 4, False), (5, 3, True), (1, 1, False)])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_tokens(shape, dtype, positions, taps, bias, together, tokens, each_isa):
    given = tensors(shape, dtype, positions, taps, bias, tokens)
    expected, window, state = truth(given, shape[1])
    given = by_head(given, shape[1]) if together else given
    for isa in each_isa:
        kept = {name: given[name].clone() for name in ("window", "state")}
        found = call(given | kept, shape[1])
        assert found.dtype == dtype and torch.equal(kept["window"].float(), window), isa
        for one, other in ((found, expected), (kept["state"], state)):
            assert (one - other).norm() < (2e-2 if dtype == torch.bfloat16 else 1e-5) * other.norm(), isa


def test_the_same_bits_for_any_number_of_threads(threads):
    answers = []
    for count in (1, 2, 3):
        cpu.set_threads(count)
        given = tensors(SHAPES[1], torch.bfloat16, 4, 4, False)
        answers.append((call(given, 2), given["state"], given["window"]))
    assert all(torch.equal(a, b) for other in answers[1:] for a, b in zip(answers[0], other, strict=True))


def test_large_and_small_numbers_stay_finite():
    given = tensors(SHAPES[0], torch.float32, 4, 4, False)
    for scale in (0.0, 1e-20, 1e4):
        given["steps"], given["mixed"] = given["steps"] * scale, given["mixed"] * scale
        assert call(given, 1).isfinite().all()


def test_tensors_that_do_not_fit_are_not_taken():
    given = tensors((1, 2, 4, 16, 16), torch.float32, 4, 4, False)
    channels = given["window"].shape[1]
    before = {name: value.clone() for name, value in given.items() if value is not None}
    for changes in (
        {"mixed": torch.randn(1, 1, channels + 1)}, {"mixed": given["mixed"].double()}, {"gates": None},
        {"mixed": given["mixed"].bfloat16()}, {"state": given["state"].bfloat16()}, {"state": given["state"].mT},
        {"norm": torch.ones(8)}, {"window": torch.randn(1, channels, 3)}, {"betas": torch.randn(1, 1, 3)},
        {"log_rates": torch.ones(3)}, {"bias": torch.ones(3)}, {"window": given["window"].expand(2, -1, -1)},
        {"state": torch.randn(4, 16, 16)},
    ):  # fmt: skip
        assert call(given | changes, 2) is None, changes
    assert call(given, 3) is None
    assert all(torch.equal(given[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("together", [False, True])
def test_a_step_is_its_parts(dtype, together, each_isa):
    """Norm, projections, the rule, the product that follows, and what it is added to."""
    shape = sequences, key_heads, heads, _, value_dim = 3, 2, 6, 24, 32
    given, hidden, random = tensors(shape, dtype, 4, 4, True), 64, torch.Generator().manual_seed(1)
    given = by_head(given, key_heads) if together else given
    x, norm = torch.randn(sequences, 1, hidden, generator=random).to(dtype), torch.rand(hidden) + 0.5
    options = 0.1, True, False
    names = ("mixed", "betas") if together else ("mixed", "gates", "betas", "steps")
    widths = [given[name].shape[-1] for name in names]
    projections = [
        Linear.pack(torch.randn(width, hidden, generator=random) * 0.2, format=format)
        for width, format in zip(widths, ("q4_0", "bf16", "bf16", "q4_0"), strict=False)
    ]
    output = Linear.pack(torch.randn(hidden, heads * value_dim, generator=random) * 0.2, format="int8")
    for linear in (*projections, output):
        linear.activations = "bf16"
    for isa in each_isa:
        normed = _native.rms_norm(x, norm, *options)
        kept, again = ({name: given[name].clone() for name in ("window", "state")} for _ in range(2))
        made = {name: linear(normed) for name, linear in zip(names, projections, strict=True)}
        expected = x + output(call(given | made | kept, key_heads))
        weights, module = [linear.weight for linear in projections], own_parts(given | again, key_heads)
        found, seconds = _native.delta_step(x, norm, options, weights, output.weight, module, False, False)
        assert 0 < seconds < 1
        assert torch.equal(found, expected) and all(torch.equal(kept[name], again[name]) for name in kept), isa
    step = functools.partial(_native.delta_step, module=module, integer=False, output_integer=False)
    whole = {"x": x, "norm_weight": norm, "norm": options, "projections": weights, "output": output.weight}
    changes = {"x": x[..., :32]}, {"x": x.double()}, {"norm_weight": norm[:32]}, {"output": weights[0]}
    for change in (*changes, {"projections": weights[:1]}, {"projections": weights[::-1]}):
        assert step(**whole | change) is None
