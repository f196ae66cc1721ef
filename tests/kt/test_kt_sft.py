"""Training: gradients against Experts' own and plain torch's, both generations of calls, and what is refused."""

from __future__ import annotations

import pytest
import torch
from gradient_cases import ROUNDED_TOLERANCE, TOLERANCE, gradients, random_lora, relative
from gradient_truth import engine_gradients
from kt_cases import IDENTITY, SCALING, E, H, I, R, batch, close, dense, loaded, wrapper

from coterie import ExpertLora, cpu, reference
from coterie.errors import ArgumentError, StateError
from coterie.kt.bound import NAMES
from coterie.kt.methods import SFT

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def lora(dtype=torch.bfloat16):
    """The factors by their names here."""
    made = random_lora((E, H, I), R, dtype)
    return {name.replace("_", "_lora_"): factor for name, factor in made.items()}


def core(factors):
    """The same by the names of ExpertLora."""
    return {name.replace("_lora", ""): factor for name, factor in factors.items()}


def trainer(factors=None, method="AMXBF16_SFT", **changed):
    made = loaded(mode="sft", method=method, group_size=64, **changed)
    made.init_lora_weights(**(lora() if factors is None else factors))
    return made


def grad_of(tokens):
    return torch.randn(tokens, H, generator=torch.Generator().manual_seed(tokens)).bfloat16()


def step(made, tokens=9, draw=0):
    """Output and all gradients, by the names of gradient_cases."""
    y = made.forward_sft(*batch(tokens, draw))
    grad_input, grads, grad_weights = made.backward(grad_of(tokens))
    named = {name.removeprefix("grad_").replace("_lora", ""): grad for name, grad in grads.items()}
    return {"y": y, "x": grad_input, "weights": grad_weights, **named}


def assert_close(found, truth, tolerance):
    assert found.keys() == truth.keys()
    for name, wanted in truth.items():
        assert relative(found[name], wanted) < tolerance, name


# --- gradients ---


@pytest.mark.parametrize("method", [name for name in SFT if not name.endswith("_SkipLoRA")])
def test_gradients_are_those_of_autograd_through_experts(method):
    factors = lora()
    made = trainer(factors, method)
    hidden, ids, weights = batch(9)
    truth = gradients(
        lambda x, w, given: made.experts(x, ids, w, given), hidden, weights, core(factors), grad_of(9), scaling=SCALING
    )
    found = step(made)
    assert found.keys() == truth.keys() and all(torch.equal(found[name], truth[name]) for name in truth)


@pytest.mark.parametrize("method", ("AMXBF16_SFT", "AMXINT8_SFT", "AMXINT4_SFT", "AMXFP8_SFT", "MXFP4_SFT"))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_plain_torch(method, dtype):
    factors = lora(dtype)
    made = trainer(factors, method)
    hidden, ids, weights = batch(9)
    plain = gradients(
        lambda x, w, given: reference.forward(x, ids, w, *made.experts.dequantize(), lora=given),
        hidden, weights, core(factors), grad_of(9), dtype=torch.float32, scaling=SCALING,
    )  # fmt: skip
    found = step(made)
    assert_close(found, plain, TOLERANCE)
    given = ExpertLora(**core(factors), scaling=SCALING)
    rounded = engine_gradients(made.experts, cpu.current_isa(), hidden, ids, weights, given, grad_of(9))
    assert_close(found, rounded, ROUNDED_TOLERANCE)


def test_experts_that_are_chosen_twice_or_not_at_all():
    factors = lora()
    made = trainer(factors)
    hidden, ids, weights = batch(9)
    ids[0], ids[1, 1], ids[2] = -1, ids[1, 0], 3
    plain = gradients(
        lambda x, w, given: reference.forward(x, ids, w, *made.experts.dequantize(), lora=given),
        hidden, weights, core(factors), grad_of(9), dtype=torch.float32, scaling=SCALING,
    )  # fmt: skip
    y = made.forward_sft(hidden, ids, weights)
    grad_input, grads, grad_weights = made.backward(grad_of(9))
    close(y, plain["y"], TOLERANCE)
    close(grad_input, plain["x"], TOLERANCE)
    close(grad_weights, plain["weights"], TOLERANCE)
    assert not grad_input[0].any() and not grad_weights[0].any()
    for name, grad in grads.items():
        close(grad, plain[name.removeprefix("grad_").replace("_lora", "")], TOLERANCE)


def test_experts_on_the_gpu_are_left_out():
    factors = lora()
    on_gpu = torch.arange(E) < 3
    made = trainer(factors, gpu_experts_mask=on_gpu)
    hidden, ids, weights = batch(9)
    whole = trainer(factors)
    y = whole.forward_sft(hidden, ids.masked_fill(on_gpu[ids], -1), weights)
    truth = whole.backward(grad_of(9))
    assert torch.equal(made.forward_sft(hidden, ids, weights), y)
    found = made.backward(grad_of(9))
    assert torch.equal(found[0], truth[0]) and torch.equal(found[2], truth[2])
    assert all(torch.equal(found[1][name], truth[1][name]) for name in truth[1])


def test_skipping_lora():
    """The forward has LoRA; the gradients take its part for a constant, and the weights' leave it out."""
    factors = lora(torch.float32)
    made, full = trainer(factors, "AMXBF16_SFT_SkipLoRA"), trainer(factors)
    hidden, ids, weights = batch(9)
    y = made.forward_sft(hidden, ids, weights)
    assert torch.equal(y, full.forward_sft(hidden, ids, weights))
    grad_input, grads, grad_weights = made.backward(grad_of(9))
    assert grads == {}

    x = hidden.float().requires_grad_()
    gate, up, down = (w.float() for w in dense())
    out, through = torch.zeros(9, H), torch.zeros(9, ids.shape[1])
    for t in range(9):
        for k, e in enumerate(ids[t].tolist()):

            def project(v, weight, name, e=e):
                low = v.detach() @ factors[f"{name}_lora_a"][e].T @ factors[f"{name}_lora_b"][e].T
                return v @ weight[e].T + SCALING * low.detach()

            h = torch.nn.functional.silu(project(x[t], gate, "gate")) * project(x[t], up, "up")
            out[t] += weights[t, k] * project(h, down, "down")
            through[t, k] = (h @ down[e].T).detach() @ grad_of(9)[t].float()
    close(y, out, TOLERANCE)
    close(grad_input, torch.autograd.grad(out, x, grad_of(9).float())[0], TOLERANCE)
    close(grad_weights, through, TOLERANCE)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64))
def test_inputs_of_any_float_dtype(dtype):
    made = trainer()
    hidden, ids, weights = batch(9)
    truth = step(made)
    y = made.forward_sft(hidden.to(dtype), ids.int(), weights.to(dtype))
    grad_input, _, grad_weights = made.backward(grad_of(9).to(dtype))
    assert y.dtype == grad_input.dtype == grad_weights.dtype == dtype
    close(y, truth["y"])
    close(grad_input, truth["x"])
    close(grad_weights, truth["weights"])


def test_output_device():
    made = trainer()
    assert made.forward_sft(*batch(3), output_device="cpu").device.type == "cpu"
    assert made.backward(grad_of(3), output_device=torch.device("cpu"))[0].device.type == "cpu"
    assert made.forward_sft(*batch(3), output_device="meta").device.type == "meta"
    grad_input, _, grad_weights = made.backward(grad_of(3), output_device="meta")
    assert grad_input.device.type == grad_weights.device.type == "meta"


# --- LoRA is the caller's ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_an_optimizer_changes_in_place_is_seen(dtype):
    factors = {name: torch.nn.Parameter(factor) for name, factor in lora(dtype).items()}
    made = trainer(factors)
    before = step(made)["y"]
    with torch.no_grad():
        for factor in factors.values():
            factor.mul_(1.5)
    made.update_lora_weights()
    changed = step(made)
    again = step(trainer({name: factor.detach().clone() for name, factor in factors.items()}))
    assert not torch.equal(before, changed["y"])
    assert all(torch.equal(changed[name], again[name]) for name in again)


def test_sgd_by_hand_lowers_the_loss():
    factors = {name: torch.nn.Parameter(factor) for name, factor in lora(torch.float32).items()}
    made, wanted = trainer(factors), grad_of(9).float() / 10
    optimizer, losses = torch.optim.SGD(factors.values(), lr=0.02), []
    for _ in range(20):
        y = made.forward(*batch(9)).float()
        losses.append((y - wanted).square().mean().item())
        made.backward((y - wanted) * 2 / y.numel())
        optimizer.step()
        optimizer.zero_grad()
        made.update_lora_weights()
    assert losses[-1] < 0.98 * losses[0]


def test_lora_of_wrong_shapes():
    made = loaded(mode="sft", method="AMXBF16_SFT")
    for name, factor in lora().items():
        wrong = {**lora(), name: factor[:, :, 1:]}
        message = rf"^{name}: expected shape \[{', '.join(map(str, factor.shape))}\], found \["
        with pytest.raises(ValueError, match=message):
            made.init_lora_weights(**wrong)
    gradients_of = {f"grad_{name}": factor for name, factor in lora().items()}
    with pytest.raises(ValueError, match=r"^grad_up_lora_b: expected shape \[8, 64, 4\], found \[7, 64, 4\]"):
        made.init_lora_weights(**lora(), **{**gradients_of, "grad_up_lora_b": gradients_of["grad_up_lora_b"][1:]})
    with pytest.raises(ValueError, match=r"gate_lora_a: expected bfloat16, .* on the CPU, found torch.int8"):
        made.init_lora_weights(**{**lora(), "gate_lora_a": lora()["gate_lora_a"].to(torch.int8)})


# --- kt-kernel 0.7.2's calls ---


def test_gradients_replace_what_is_in_tensors_for_them():
    factors, into = lora(), {f"grad_{name}": torch.ones_like(factor) for name, factor in lora().items()}
    made = loaded(mode="sft", method="AMXBF16_SFT")
    made.init_lora_weights(**factors, **into)
    truth = step(trainer(factors))
    for scale in (1.0, 2.0):
        y = made.forward(*batch(9))
        grad_input, grad_weights = made.backward(grad_of(9), optimizer_grad_scale=scale)
        assert torch.equal(y, truth["y"])
        assert torch.equal(grad_input, truth["x"]) and torch.equal(grad_weights, truth["weights"])
        for name in NAMES:
            assert torch.equal(into[f"grad_{name}"], scale * truth[name.replace("_lora", "")])


def test_gradients_are_added_to_those_of_parameters():
    factors = {name: torch.nn.Parameter(factor) for name, factor in lora(torch.float32).items()}
    made = loaded(mode="sft", method="AMXBF16_SFT")
    made.bind_lora_parameters(**factors)
    truth = step(trainer(factors))
    assert all(factor.grad is None for factor in factors.values())
    for times in (1, 2, 3):
        made.forward(*batch(9))
        assert len(made.backward(grad_of(9), "cpu")) == 2
        for name, factor in factors.items():
            close(factor.grad, times * truth[name.replace("_lora", "")], 1e-6)


def test_tensors_for_the_gradients_of_parameters_become_their_grad():
    factors = {name: torch.nn.Parameter(factor) for name, factor in lora().items()}
    into = {f"grad_{name}": torch.ones_like(factor.detach()) for name, factor in factors.items()}
    made = loaded(mode="sft", method="AMXBF16_SFT")
    made.init_lora_weights(**factors, **into)
    truth = step(trainer(factors))
    for _ in range(2):
        made.forward(*batch(9))
        made.backward(grad_of(9))
        for name, factor in factors.items():
            assert factor.grad.data_ptr() == into[f"grad_{name}"].data_ptr()
            assert torch.equal(factor.grad, truth[name.replace("_lora", "")])
            factor.grad = None


def test_lora_params_are_added_to_as_well():
    parameters = {name: torch.nn.Parameter(factor) for name, factor in lora(torch.float32).items()}
    made = trainer(lora(torch.float32))
    for times in (1, 2):
        made.forward_sft(*batch(9))
        _, grads, _ = made.backward(grad_of(9), lora_params=parameters)
        for name, parameter in parameters.items():
            assert torch.equal(parameter.grad, times * grads[f"grad_{name}"])
    made.forward_sft(*batch(9))
    with pytest.raises(ValueError, match=r"lora_params: expected names gate_lora_a, .*; found 'gate'"):
        made.backward(grad_of(9), lora_params={"gate": parameters["gate_lora_a"]})
    assert len(made.backward(grad_of(9))) == 3


def test_backward_in_the_background():
    made = trainer({name: torch.nn.Parameter(factor) for name, factor in lora().items()})
    truth = step(made)
    made.forward(*batch(9))
    grad = grad_of(9)
    made.submit_backward_async(grad)
    grad.zero_()
    with pytest.raises(StateError, match=r"a backward was submitted already: call sync_backward\(\) first"):
        made.submit_backward_async(grad)
    grad_input, grad_weights = made.sync_backward()
    assert torch.equal(grad_input, truth["x"]) and torch.equal(grad_weights, truth["weights"])
    assert torch.equal(made._bound.factors["up_lora_a"].grad, truth["up_a"])
    with pytest.raises(StateError, match=r"call submit_backward_async\(\) first"):
        made.sync_backward()


# --- submitted, and in order ---


def test_forward_in_the_background():
    made = trainer()
    truth = step(made)
    for submit, sync in ((made.submit_forward_sft, made.sync_forward_sft), (made.submit_forward, made.sync_forward)):
        hidden, ids, weights = batch(9)
        submit(hidden, ids, weights)
        hidden.zero_(), ids.zero_(), weights.zero_()
        assert torch.equal(sync(), truth["y"])
        found = made.backward(grad_of(9))
        assert torch.equal(found[0], truth["x"]) and torch.equal(found[-1], truth["weights"])
        with pytest.raises(RuntimeError, match=r"no forward was submitted: call submit_forward_sft\(\)"):
            sync()


def test_a_forward_that_was_not_waited_for_is_replaced():
    made = trainer()
    truth = step(made)
    made.submit_forward_sft(*batch(5))
    made.submit_forward_sft(*batch(9))
    assert torch.equal(made.sync_forward_sft(), truth["y"])
    assert torch.equal(made.backward(grad_of(9))[0], truth["x"])
    with pytest.raises(StateError):
        made.backward(grad_of(5))


def test_a_forward_without_a_backward():
    made = trainer()
    for _ in range(2):
        close(made.forward_sft(*batch(9), save_for_backward=False), step(trainer())["y"])
    with pytest.raises(RuntimeError, match=r"no forward is outstanding: call forward_sft\(\) first"):
        made.backward(grad_of(9))


def test_outstanding_forwards_are_counted_and_the_latest_goes_first():
    made = trainer(max_cache_depth=2)
    truths = [step(made, tokens) for tokens in (9, 5)]
    made.forward_sft(*batch(9))
    made.forward_sft(*batch(5))
    with pytest.raises(RuntimeError, match=r"2 forwards are outstanding, max_cache_depth is 2: call backward\(\)"):
        made.forward_sft(*batch(3))
    assert made.forward_sft(*batch(3), save_for_backward=False).shape == (3, H)
    with pytest.raises(ValueError, match=r"grad_output: expected .* forward, \[5, 128\], found \[9, 128\]"):
        made.backward(grad_of(9))
    for tokens, truth in ((5, truths[1]), (9, truths[0])):
        assert torch.equal(made.backward(grad_of(tokens))[0], truth["x"])


def test_calls_that_come_too_early_name_the_one_to_make():
    made = wrapper(mode="sft", method="AMXBF16_SFT")
    with pytest.raises(RuntimeError, match=r"call load_weights\(\) or load_weights_from_tensors\(\) first"):
        made.forward_sft(*batch(3))
    with pytest.raises(RuntimeError, match=r"no forward is outstanding: call forward_sft\(\) first"):
        made.backward(grad_of(3))
    made.load_weights_from_tensors(*dense(), IDENTITY)
    for call in (lambda: made.forward_sft(*batch(3)), made.update_lora_weights):
        with pytest.raises(RuntimeError, match=r"no LoRA is set up: call init_lora_weights\(\) first"):
            call()
    made.init_lora_weights(**lora())
    assert made.forward_sft(*batch(3)).shape == (3, H)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, i, w: batch(65), r"at most chunked_prefill_size=64 tokens, \[64, 128\], found shape \[65, 128\]"),
        (lambda x, i, w: (x, i[1:], w), r"expert ids: expected shape \[9, 4\].*found \[8, 4\]"),
        (lambda x, i, w: (x, i, w[:, 1:]), r"weights: expected shape \[9, 4\].*found \[9, 3\]"),
        (lambda x, i, w: (x[:, 1:], i, w), r"hidden: expected shape \[tokens, 128\], found \[9, 127\]"),
        (lambda x, i, w: (x, i + E, w), "out of range"),
    ],
)
def test_a_forward_that_fails_leaves_the_object_usable(change, message):
    made = trainer()
    truth = step(made)
    with pytest.raises(ValueError, match=message) as raised:
        made.forward_sft(*change(*batch(9)))
    assert isinstance(raised.value, ArgumentError)
    found = step(made)
    assert all(torch.equal(found[name], truth[name]) for name in truth)


def test_a_backward_that_fails_leaves_the_forward_outstanding(monkeypatch):
    made = trainer()
    truth = step(made)
    made.forward_sft(*batch(9))
    with pytest.raises(ValueError, match=r"grad_output: expected a float dtype, found torch.int64"):
        made.backward(grad_of(9).long())
    with pytest.raises(ValueError, match="optimizer_grad_scale: expected a positive number, found 0"):
        made.backward(grad_of(9), optimizer_grad_scale=0)

    def fails(*_):
        raise MemoryError("no memory for the workspace")

    with monkeypatch.context() as patched:
        patched.setattr("coterie.kt.steps.backward", fails)
        with pytest.raises(MemoryError):
            made.backward(grad_of(9))
    assert torch.equal(made.backward(grad_of(9))[0], truth["x"])


def test_a_whole_step_under_torch_inference_and_grad_modes():
    made = trainer({name: torch.nn.Parameter(factor) for name, factor in lora().items()})
    truth = step(made)
    hidden, ids, weights = batch(9)
    with torch.no_grad():
        y = made.forward_sft(hidden.requires_grad_(), ids, weights.requires_grad_())
    assert torch.equal(y, truth["y"]) and not y.requires_grad
    with torch.enable_grad():
        assert torch.equal(made.backward(grad_of(9).requires_grad_())[0], truth["x"])
