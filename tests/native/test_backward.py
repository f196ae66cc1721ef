"""Training: the output and every gradient, against plain torch in float32 on the dequantised weights, and against the
same rounded where the engine rounds."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, dense, name_of, options
from gradient_cases import gradients, random_batch, random_lora, relative
from gradient_truth import compare
from torch import Tensor

import coterie
from coterie import Activation, ExpertLora, Experts
from coterie.errors import ArgumentError
from coterie.formats import Format

# (experts, hidden, intermediate), top_k, tokens, rank
SIZES = {
    "two experts": ((2, 64, 64), 1, 7, 8),
    "odd sizes": ((5, 33, 50), 3, 64, 3),
    "rank one": ((5, 96, 160), 5, 64, 1),
    "one token": ((64, 128, 64), 8, 1, 16),
    "many tokens": ((5, 128, 192), 2, 300, 16),
    "high rank": ((3, 128, 128), 2, 64, 128),
    "middle rank": ((4, 64, 128), 4, 64, 64),
    "most experts empty": ((256, 64, 64), 4, 7, 8),
}


@pytest.mark.parametrize("case", SIZES)
def test_every_gradient(isa: str, case: str) -> None:
    sizes, top_k, tokens, rank = SIZES[case]
    experts = Experts.pack(*dense(sizes), format="bf16")
    found = compare(experts, random_batch(sizes, top_k, tokens), random_lora(sizes, rank, torch.bfloat16))
    ids = random_batch(sizes, top_k, tokens)[1]
    for e in set(range(sizes[0])) - set(ids.unique().tolist()):
        assert not found["gate_a"][e].any() and not found["down_b"][e].any()


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_every_format(isa: str, spec: Format) -> None:
    sizes = (4, 128, 256)
    experts = Experts.pack(*dense(sizes), **options(spec))
    compare(experts, random_batch(sizes, 2, 40), random_lora(sizes, 8, torch.float32))


@pytest.mark.parametrize(
    "activation",
    [Activation("gelu"), Activation("gelu_tanh"), Activation("silu", 1.702, 3.0, 1.0)],
    ids=lambda a: a.kind,
)
@pytest.mark.parametrize("has_gate", [True, False])
def test_activations_and_biases(isa: str, activation: Activation, has_gate: bool) -> None:
    sizes = (4, 64, 96)
    random = torch.Generator().manual_seed(0)
    rows = {"gate": 96, "up": 96, "down": 64} if has_gate else {"up": 96, "down": 64}
    biases = {f"{name}_bias": torch.randn(4, n, generator=random) for name, n in rows.items()}
    experts = Experts.pack(*dense(sizes, has_gate), format="bf16", activation=activation, **biases)
    compare(experts, random_batch(sizes, 2, 40), random_lora(sizes, 8, torch.bfloat16, has_gate))


def test_all_tokens_on_one_expert(isa: str) -> None:
    sizes = (4, 64, 128)
    x, ids, weights, grad = random_batch(sizes, 1, 100)
    experts = Experts.pack(*dense(sizes), format="int4")
    compare(experts, (x, torch.full_like(ids, 2), weights, grad), random_lora(sizes, 16, torch.bfloat16))


def test_shared_a_gets_both_gradients() -> None:
    sizes = (4, 64, 128)
    x, ids, weights, grad = random_batch(sizes, 2, 40)
    experts = Experts.pack(*dense(sizes), format="bf16")
    lora = random_lora(sizes, 8, torch.float32)
    same = lora | {"up_a": lora["gate_a"]}
    apart = gradients(lambda x, w, adapter: experts(x, ids, w, lora=adapter), x, weights, same, grad)
    shared = lora["gate_a"].clone().requires_grad_()
    adapter = ExpertLora(shared, lora["gate_b"], shared, lora["up_b"], lora["down_a"], lora["down_b"], scaling=2.0)
    y = experts(x, ids, weights, lora=adapter)
    assert torch.equal(y.detach(), apart["y"])
    (found,) = torch.autograd.grad(y, [shared], grad)
    assert relative(found, apart["gate_a"] + apart["up_a"]) < 1e-5


def test_some_projections_and_different_ranks_and_scalings() -> None:
    sizes = (4, 64, 128)
    experts = Experts.pack(*dense(sizes), format="int8")
    low, high = random_lora(sizes, 3, torch.bfloat16), random_lora(sizes, 20, torch.bfloat16)
    compare(experts, random_batch(sizes, 2, 40), {"down_a": low["down_a"], "down_b": low["down_b"]})
    mixed = low | {"down_a": high["down_a"], "down_b": high["down_b"]}
    compare(experts, random_batch(sizes, 2, 40), mixed, scaling=(0.5, 1.0, 3.0))
    compare(experts, random_batch(sizes, 2, 40), {})


def test_same_bits_for_any_number_of_threads(isa: str, threads: None) -> None:
    sizes = (5, 96, 160)
    x, ids, weights, grad = random_batch(sizes, 3, 70)
    experts, lora = Experts.pack(*dense(sizes), format="int4"), random_lora(sizes, 16, torch.bfloat16)
    seen = []
    for count in (1, 2, 3, 7):
        coterie.cpu.set_threads(count)
        seen.append(gradients(lambda x, w, adapter: experts(x, ids, w, lora=adapter), x, weights, lora, grad))
    for other in seen[1:]:
        assert all(torch.equal(other[name], seen[0][name]) for name in other)


def test_no_tokens_and_two_forwards_before_a_backward() -> None:
    sizes = (4, 64, 128)
    experts, lora = Experts.pack(*dense(sizes), format="bf16"), random_lora(sizes, 8, torch.float32)
    empty = random_batch(sizes, 2, 0)
    found = gradients(lambda x, w, adapter: experts(x, empty[1], w, lora=adapter), empty[0], empty[2], lora, empty[3])
    assert found["x"].shape == (0, 64) and not found["up_a"].any()
    first, second = random_batch(sizes, 2, 7), random_batch(sizes, 2, 30)
    a, b = (batch[0].detach().requires_grad_() for batch in (first, second))
    adapter = ExpertLora(**lora)
    ya, yb = experts(a, first[1], first[2], lora=adapter), experts(b, second[1], second[2], lora=adapter)
    (late,) = torch.autograd.grad(ya, [a], first[3])
    (alone,) = torch.autograd.grad(experts(a, first[1], first[2], lora=adapter), [a], first[3])
    assert torch.equal(late, alone)
    assert torch.autograd.grad(yb, [b], second[3])[0].isfinite().all()


@pytest.mark.parametrize("tokens", [0, 7])
def test_what_no_token_reaches_is_zero_whatever_was_in_memory(tokens: int) -> None:
    sizes = (64, 64, 128)
    experts, lora = Experts.pack(*dense(sizes), format="bf16"), random_lora(sizes, 8, torch.float32)
    x, ids, weights, grad = random_batch(sizes, 2, tokens)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        found = gradients(lambda x, w, adapter: experts(x, ids, w, lora=adapter), x, weights, lora, grad)
    finally:
        torch.use_deterministic_algorithms(False)
    reached = torch.zeros(64, dtype=torch.bool).index_fill(0, ids[ids >= 0], True)
    for name in lora:
        assert not found[name][~reached].any() and found[name][reached].isfinite().all(), name


def test_b_with_the_experts_adjacent_in_memory_gives_the_same_bits() -> None:
    sizes = (4, 64, 128)
    x, ids, weights, grad = random_batch(sizes, 2, 40)
    experts, lora = Experts.pack(*dense(sizes), format="int4"), random_lora(sizes, 8, torch.float32)

    def found(place) -> dict[str, Tensor]:
        def forward(x: Tensor, w: Tensor, adapter: ExpertLora) -> Tensor:
            factors = [place(factor) for pair in adapter.pairs().values() for factor in pair]
            return experts(x, ids, w, lora=ExpertLora(*factors, scaling=adapter.scaling))

        return gradients(forward, x, weights, lora, grad)

    plain, moved = found(lambda f: f), found(lambda f: f.permute(1, 2, 0).contiguous().permute(2, 0, 1))
    assert all(torch.equal(moved[name], plain[name]) for name in plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
def test_nan_and_inf_flow_through(isa: str, kind: str, value: float) -> None:
    """One in x, one in the gradient of the output: each spoils its own token and its expert, and no other."""
    sizes = (4, 64, 128)
    experts, lora = Experts.pack(*dense(sizes), format=kind), random_lora(sizes, 8, torch.bfloat16)
    x, _, weights, grad = random_batch(sizes, 1, 4)
    ids = torch.arange(4)[:, None]
    x[1, 3], grad[2, 5] = value, value
    found = gradients(lambda x, w, adapter: experts(x, ids, w, lora=adapter), x, weights, lora, grad)
    assert not found["y"][1].isfinite().any() and found["y"][[0, 2, 3]].isfinite().all()
    assert not found["x"][2].isfinite().any() and found["x"][[0, 3]].isfinite().all()
    assert not found["weights"][[1, 2]].isfinite().any() and found["weights"][[0, 3]].isfinite().all()
    for name in lora:
        assert not found[name][1].isfinite().all() and found[name][[0, 3]].isfinite().all(), name
        assert not found[name][2].isfinite().all(), name


def test_without_gradients_the_adapter_still_counts() -> None:
    sizes = (4, 64, 128)
    experts, lora = Experts.pack(*dense(sizes), format="bf16"), random_lora(sizes, 8, torch.bfloat16)
    x, ids, weights, _ = random_batch(sizes, 2, 7)
    with torch.no_grad():
        y = experts(x, ids, weights, lora=ExpertLora(**lora, scaling=2.0))
    assert torch.equal(y, experts(x.requires_grad_(), ids, weights, lora=ExpertLora(**lora, scaling=2.0)).detach())
    assert relative(experts(x.detach(), ids, weights), y) > 0.05


@pytest.mark.parametrize("kind", ["bf16", "int4"])
@pytest.mark.parametrize("of_b", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("of_x", [torch.bfloat16, torch.float32, torch.float16])
def test_every_dtype(of_x: torch.dtype, of_b: torch.dtype, kind: str) -> None:
    """Of x, and of A and B, which need not have the same; gradients come in each one's own (see compare)."""
    sizes = (4, 64, 128)
    experts = Experts.pack(*dense(sizes), format=kind)
    x, ids, weights, grad = random_batch(sizes, 2, 40)
    lora = {n: t.to(of_b) if n.endswith("_b") else t for n, t in random_lora(sizes, 8, torch.float32).items()}
    compare(experts, (x.to(of_x), ids, weights, grad), lora)


@pytest.mark.parametrize("of_x", [torch.bfloat16, torch.float32])
def test_autocast_changes_nothing(of_x: torch.dtype) -> None:
    """The engine chooses its own precision: the same bits in the same dtypes, with adapters and without."""
    sizes = (4, 64, 128)
    experts, lora = Experts.pack(*dense(sizes), format="int8"), random_lora(sizes, 8, torch.float32)
    x, ids, weights, grad = random_batch(sizes, 2, 40)

    def results() -> dict[str, Tensor]:
        found = gradients(lambda x, w, adapter: experts(x, ids, w, lora=adapter), x.to(of_x), weights, lora, grad)
        return found | {"without adapters": experts(x.to(of_x), ids, weights)}

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        found = results()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(found[name].dtype == expected[name].dtype for name in expected)


def test_made_in_inference_mode_and_trained() -> None:
    sizes = (4, 64, 128)
    with torch.inference_mode():
        experts = Experts.pack(*dense(sizes), format="bf16")
    compare(experts, random_batch(sizes, 2, 7), random_lora(sizes, 8, torch.float32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_a": torch.zeros(4, 8, 63)}, r"gate_a: expected shape \[4, 8, 64\], found \[4, 8, 63\]"),
        ({"up_b": torch.zeros(4, 128, 7)}, r"up_b: expected shape \[4, 128, 8\], found \[4, 128, 7\]"),
        ({"down_a": torch.zeros(4, 0, 128), "down_b": torch.zeros(4, 64, 0)}, "rank >= 1"),
        ({"down_b": None}, "expected both A and B, found only A"),
        ({"down_a": torch.zeros(4, 8, 128, dtype=torch.int32)}, "down_a: expected bfloat16"),
        ({"scaling": (1.0, 2.0)}, "expected one number or three, found 2"),
    ],
)
def test_adapters_that_do_not_fit(change: dict, message: str) -> None:
    sizes = (4, 64, 128)
    experts = Experts.pack(*dense(sizes), format="bf16")
    x, ids, weights, _ = random_batch(sizes, 2, 7)
    with pytest.raises(ArgumentError, match=message):
        experts(x, ids, weights, lora=ExpertLora(**(random_lora(sizes, 8, torch.float32) | change)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_torch_compile(backend: str) -> None:
    sizes = (4, 64, 128)
    experts, lora = Experts.pack(*dense(sizes), format="bf16"), random_lora(sizes, 8, torch.float32)
    x, ids, weights, grad = random_batch(sizes, 2, 7)

    def step(x, w, adapter):
        return experts(x * 1.0, ids, w, lora=adapter) * 1.0

    eager = gradients(step, x, weights, lora, grad)
    compiled = gradients(torch.compile(step, fullgraph=True, backend=backend), x, weights, lora, grad)
    assert all(torch.equal(eager[name], compiled[name]) for name in eager)
