"""Deferred experts: each is computed once, and added to the next layer's result once, whatever happens between."""

from __future__ import annotations

import threading

import pytest
import torch
from kt_cases import K, batch, close, dense, loaded

from coterie import reference
from coterie.kt import KTMoEWrapper
from coterie.kt.deferral import waiting


def layers(deferred: int, count: int = 3):
    """Layers of experts of their own; the last defers nothing."""
    return [
        loaded(seed=n, layer_idx=n, method="BF16", max_deferred_experts_per_token=deferred if n < count - 1 else None)
        for n in range(count)
    ]


def parts(layer: int, hidden, ids, weights, deferred: int):
    """What a layer's immediate and deferred experts add, in plain torch."""
    now, later = torch.zeros_like(weights), torch.zeros_like(weights)
    for t in range(len(weights)):
        order = sorted(range(K), key=lambda k: -weights[t, k].item())
        for place, k in enumerate(order):
            (now if place < K - deferred else later)[t, k] = weights[t, k]
    return tuple(reference.forward(hidden, ids, w, *dense(layer)) for w in (now, later))


def expected(batches, deferred: int):
    """The result of each layer for a batch, of which `batches` has the inputs of each layer."""
    found, before = [], 0
    for layer, one in enumerate(batches):
        now, later = parts(layer, *one, deferred if layer < len(batches) - 1 else 0)
        found.append(now + before)
        before = later
    return found


def inputs(tokens: int, draw: int, count: int = 3):
    return [batch(tokens, draw=10 * draw + layer) for layer in range(count)]


def nothing_waits():
    return not any(waiting()._tickets.values())


def test_each_id_is_immediate_or_deferred():
    ids = torch.tensor([[4, 2, 7, 1], [0, 3, -1, 5]])
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.3, 0.2]])
    made = loaded()
    cases = {
        4: ([[4, 2, 7, 1], [0, 3, -1, 5]], [[-1] * 4, [-1] * 4]),
        2: ([[-1, 2, 7, -1], [0, -1, -1, -1]], [[4, -1, -1, 1], [-1, 3, -1, 5]]),
        1: ([[-1, 2, -1, -1], [-1, -1, -1, -1]], [[4, -1, 7, 1], [0, 3, -1, 5]]),
        0: ([[-1] * 4, [-1] * 4], [[4, 2, 7, 1], [0, 3, -1, 5]]),
        -1: ([[-1] * 4, [-1] * 4], [[4, 2, 7, 1], [0, 3, -1, 5]]),
    }
    for protected, (immediate, deferred) in cases.items():
        found = made.select_deferred_experts(ids, scores, protected)
        assert [part.tolist() for part in found] == [immediate, deferred], protected
    assert ids.tolist() == [[4, 2, 7, 1], [0, 3, -1, 5]]
    with pytest.raises(ValueError, match=r"expected the shape \[T,K\] of expert_ids, \[2, 4\], found \[2, 3\]"):
        made.select_deferred_experts(ids, scores[:, 1:], 2)


@pytest.mark.parametrize("deferred", (0, 1, 2, K, K + 1))
def test_a_sequence_of_layers(deferred):
    chain, given = layers(deferred), inputs(5, 0)
    for _ in range(2):
        for layer, one, truth in zip(chain, given, expected(given, min(deferred, K)), strict=True):
            close(layer.forward(*one), truth)
        assert nothing_waits()


def test_deferred_sums_and_results_add_up_to_the_plain_ones():
    chain, plain, given = layers(2), layers(0), inputs(6, 0)
    found = sum(layer.forward(*one).float() for layer, one in zip(chain, given, strict=True))
    close(found, sum(layer.forward(*one).float() for layer, one in zip(plain, given, strict=True)))


@pytest.mark.parametrize("tokens", ((5, 5), (5, 3)), ids=("one-size", "two-sizes"))
def test_batches_that_take_turns(tokens):
    chain = layers(2)
    given = [inputs(size, draw) for draw, size in enumerate(tokens)]
    truths = [expected(one, 2) for one in given]
    for number, layer in enumerate(chain):
        for one, truth in zip(given, truths, strict=True):
            close(layer.forward(*one[number]), truth[number])
    assert nothing_waits()


def test_batches_that_are_outstanding_together():
    chain = layers(2)
    given = [inputs(5, draw) for draw in range(2)]
    truths = [expected(one, 2) for one in given]
    for number, layer in enumerate(chain):
        for one in given:
            layer.submit_forward(*one[number])
        for one, truth in zip(given, truths, strict=True):
            close(layer.sync_forward(one[number][0]), truth[number])
    assert nothing_waits()


def test_batches_of_other_sizes_run_whole_between_two_layers():
    chain = layers(2)
    first, second = inputs(5, 0), inputs(3, 1)
    truths = expected(first, 2), expected(second, 2)
    close(chain[0].forward(*first[0]), truths[0][0])
    for layer, one, truth in zip(chain, second, truths[1], strict=True):
        close(layer.forward(*one), truth)
    for number in (1, 2):
        close(chain[number].forward(*first[number]), truths[0][number])
    assert nothing_waits()


def test_threads_do_not_mix_their_batches():
    chain = layers(2)
    given = [inputs(5, draw) for draw in range(4)]
    truths = [expected(one, 2) for one in given]
    found = [[] for _ in given]
    turn = threading.Barrier(len(given), timeout=300)

    def run(number):
        for layer, one in zip(chain, given[number], strict=True):
            turn.wait()
            found[number].append(layer.forward(*one))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(given))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, truth in zip(found, truths, strict=True):
        for output, one in zip(outputs, truth, strict=True):
            close(output, one)


def test_a_thread_waits_for_what_another_submitted():
    chain, given = layers(2, 2), inputs(5, 0, 2)
    truth, found = expected(given, 2), []
    for number, layer in enumerate(chain):
        layer.submit_forward(*given[number])
        thread = threading.Thread(target=lambda n=number, made=layer: found.append(made.sync_forward(given[n][0])))
        thread.start()
        thread.join()
    for output, one in zip(found, truth, strict=True):
        close(output, one)


def bad_ids(hidden, ids, weights):
    return hidden, ids + 8, weights


def test_a_layer_that_fails_is_run_again():
    chain, given = layers(2), inputs(5, 0)
    truth = expected(given, 2)
    for layer, one, output in zip(chain, given, truth, strict=True):
        for _ in range(2):
            with pytest.raises(ValueError, match="out of range"):
                layer.forward(*bad_ids(*one))
        close(layer.forward(*one), output)
    assert nothing_waits()


class Failing:
    """A ticket whose work failed."""

    def wait(self):
        raise MemoryError("no memory for the workspace")


@pytest.mark.parametrize("part", ("now", "before"))
def test_a_layer_that_fails_while_it_computes_is_run_again(part):
    chain, given = layers(2), inputs(5, 0)
    truth = expected(given, 2)
    close(chain[0].forward(*given[0]), truth[0])
    chain[1].submit_forward(*given[1])
    (forward,) = chain[1]._submitted.values()
    good = getattr(forward, part)
    setattr(forward, part, Failing())
    with pytest.raises(MemoryError):
        chain[1].sync_forward(given[1][0])
    assert not chain[1]._submitted
    if part == "before":  # what failed waits on, and fails again
        with pytest.raises(MemoryError):
            chain[1].forward(*given[1])
        assert isinstance(waiting().take(0, given[1][0].shape), Failing)
        waiting().put_back(0, given[1][0].shape, good)
    for number in (1, 2):
        close(chain[number].forward(*given[number]), truth[number])
    assert nothing_waits()


def test_a_batch_that_fails_keeps_its_turn():
    chain = layers(2)
    given = [inputs(5, draw) for draw in range(2)]
    truths = [expected(one, 2) for one in given]
    for one in given:
        chain[0].forward(*one[0])
    chain[1].submit_forward(*given[0][1])
    (forward,) = chain[1]._submitted.values()
    forward.now = Failing()
    with pytest.raises(MemoryError):
        chain[1].sync_forward(given[0][1][0])
    for one, truth in zip(given, truths, strict=True):
        close(chain[1].forward(*one[1]), truth[1])


def test_ctrl_c_while_waiting_loses_nothing():
    class Interrupted:
        def wait(self):
            raise KeyboardInterrupt

    chain, given = layers(2, 2), inputs(5, 0, 2)
    truth = expected(given, 2)
    close(chain[0].forward(*given[0]), truth[0])
    chain[1].submit_forward(*given[1])
    (forward,) = chain[1]._submitted.values()
    forward.now, ticket = Interrupted(), forward.now
    with pytest.raises(KeyboardInterrupt):
        chain[1].sync_forward(given[1][0])
    forward.now = ticket
    close(chain[1].sync_forward(given[1][0]), truth[1])


def test_an_exception_between_submit_and_sync():
    """The layer is submitted again, and takes what the first submission had taken."""
    chain, given = layers(2), inputs(5, 0)
    truth = expected(given, 2)
    for layer, one, output in zip(chain, given, truth, strict=True):
        layer.submit_forward(*one)
        close(layer.forward(*one), output)
    assert nothing_waits()


def test_a_batch_that_is_given_up_is_cleared():
    chain, first, second = layers(2), inputs(5, 0), inputs(5, 1)
    chain[0].forward(*first[0])
    assert not nothing_waits()
    KTMoEWrapper.clear_buffer_cache()
    for layer, one, truth in zip(chain, second, expected(second, 2), strict=True):
        close(layer.forward(*one), truth)


def test_a_first_layer_that_fails_leaves_nothing():
    chain, given = layers(2, 2), inputs(5, 0, 2)
    with pytest.raises(ValueError, match="out of range"):
        chain[0].forward(*bad_ids(*given[0]))
    assert nothing_waits()
    now, _ = parts(1, *given[1], 0)
    close(chain[1].forward(*given[1]), now)
