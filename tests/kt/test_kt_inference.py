"""Forwards for inference: at once, in the background, of several batches."""

from __future__ import annotations

import pytest
import torch
from kt_cases import E, K, batch, close, dense, loaded

from coterie import reference
from coterie.errors import ArgumentError, StateError
from coterie.kt.methods import INFERENCE


@pytest.mark.parametrize("method", INFERENCE)
def test_the_output_of_plain_torch(method):
    made = loaded(method=method)
    for tokens in (1, 40):
        hidden, ids, weights = batch(tokens)
        expected = reference.forward(hidden, ids, weights, *made.experts.dequantize())
        close(made.forward(hidden, ids, weights, None), expected, 0.03)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32, torch.float64))
def test_dtypes(dtype):
    made = loaded(method="BF16")
    hidden, ids, weights = batch(5)
    found = made.forward(hidden.to(dtype), ids.int(), weights.to(dtype))
    assert found.dtype == dtype
    close(found, reference.forward(hidden, ids, weights, *dense()))


def test_no_tokens():
    assert loaded().forward(*batch(0)).shape == (0, 128)


def test_inputs_may_change_and_go_once_they_are_submitted():
    made = loaded()
    expected = made.forward(*batch(9))
    hidden, ids, weights = batch(9)
    made.submit_forward(hidden, ids, weights, None)
    hidden.zero_(), ids.zero_(), weights.zero_()
    assert torch.equal(made.sync_forward(hidden, None), expected)


def test_batches_that_are_outstanding_together():
    made = loaded()
    batches = [batch(5), batch(3), batch(5, draw=1)]
    expected = [made.forward(*one) for one in batches]
    for one in batches:
        made.submit_forward(*one)
    for number in (2, 0, 1):
        assert torch.equal(made.sync_forward(batches[number][0]), expected[number])


def test_the_same_values_elsewhere_are_enough_where_one_batch_fits():
    made = loaded()
    one, other = batch(5), batch(5, draw=1)
    expected = made.forward(*one)
    made.submit_forward(*one)
    assert torch.equal(made.sync_forward(one[0].clone()), expected)
    made.submit_forward(*one)
    made.submit_forward(*other)
    with pytest.raises(StateError, match=r"2 forwards of \[5, 128\] hidden_states are outstanding"):
        made.sync_forward(one[0].clone())
    assert torch.equal(made.sync_forward(one[0]), expected)


def test_hidden_states_that_are_submitted_again_replace_what_was_not_waited_for():
    made = loaded()
    hidden, ids, weights = batch(5)
    made.submit_forward(hidden, ids, weights)
    made.submit_forward(hidden, ids, 2 * weights)
    assert torch.equal(made.sync_forward(hidden), made.forward(hidden, ids, 2 * weights))
    with pytest.raises(RuntimeError, match=r"no forward of \[5, 128\] hidden_states: call submit_forward\(\) first"):
        made.sync_forward(hidden)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, i, w: (x[:, 1:], i, w), r"hidden: expected shape \[tokens, 128\], found \[4, 127\]"),
        (lambda x, i, w: (x[0], i, w), r"hidden: expected shape \[tokens, 128\], found \[128\]"),
        (lambda x, i, w: (x, i[1:], w), r"expert ids: expected shape \[4, 4\].*found \[3, 4\]"),
        (lambda x, i, w: (x, i, w[:, 1:]), r"weights: expected shape \[4, 4\].*found \[4, 3\]"),
        (lambda x, i, w: (x, i.float(), w), "expert ids: expected integers, found torch.float32"),
        (lambda x, i, w: (x, i, w.int()), "float dtypes, found torch.bfloat16, torch.int32"),
        (lambda x, i, w: (x, i + E, w), "is out of range"),
        (lambda x, i, w: (x, i - 2, w), "is out of range"),
    ],
)
def test_inputs_that_do_not_fit_leave_the_object_usable(change, message):
    made = loaded()
    expected = made.forward(*batch(4))
    with pytest.raises(ValueError, match=message) as raised:
        made.submit_forward(*change(*batch(4)))
    assert isinstance(raised.value, ArgumentError)
    assert torch.equal(made.forward(*batch(4)), expected)


def test_inside_inference_mode():
    made = loaded()
    expected = made.forward(*batch(4))
    with torch.inference_mode():
        assert torch.equal(made.forward(*batch(4)), expected)


def test_tensors_that_require_grad():
    made = loaded()
    hidden, ids, weights = batch(4)
    expected = made.forward(hidden, ids, weights)
    found = made.forward(hidden.requires_grad_(), ids, weights.requires_grad_())
    assert torch.equal(found, expected) and not found.requires_grad


def test_ids_of_no_expert():
    made = loaded(method="BF16")
    hidden, ids, weights = batch(4)
    ids[:, 1] = -1
    close(made.forward(hidden, ids, weights), reference.forward(hidden, ids, weights, *dense()))
    assert not made.forward(hidden, torch.full((4, K), -1), weights).any()


def test_all_experts_of_every_token():
    made = loaded(method="BF16", num_experts_per_tok=E)
    hidden, _, _ = batch(4)
    ids, weights = torch.arange(E).repeat(4, 1), torch.rand(4, E)
    close(made.forward(hidden, ids, weights), reference.forward(hidden, ids, weights, *dense()))
