"""Forwards in the background: the call's bits and errors, in order, whatever is dropped or deleted."""

from __future__ import annotations

import contextlib
import gc
import random
import threading
import weakref

import pytest
import torch
from engine_cases import FORMATS, Batch, dense, name_of, options, packed
from gradient_cases import random_batch, random_lora
from instruction_sets import ISAS
from python_threads import compute_at_once
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from coterie import ExpertLora, Experts, Ticket, _native, cpu
from coterie.errors import ArgumentError

SIZES = (4, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextlib.contextmanager
def held():
    """Nothing that is submitted meanwhile is begun."""
    flag = torch.zeros(1, dtype=torch.uint8)
    hold = _native.submit_hold(flag.data_ptr(), flag)
    try:
        yield
        assert not hold.done
    finally:
        flag.fill_(1)


@pytest.fixture
def experts():
    return Experts.pack(*dense(SIZES), format="int8")


@pytest.fixture
def inputs():
    return Batch(9, 2).tensors(SIZES)


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_the_bits_of_the_call(spec):
    experts = packed(spec, SIZES)
    for tokens, dtype in ((1, torch.bfloat16), *((40, dtype) for dtype in DTYPES), (0, torch.float32)):
        x, ids, weights, _ = random_batch(SIZES, 2, tokens)
        x = x.to(dtype)
        expected = experts(x, ids, weights)
        with held():
            ticket = experts.submit(x, ids, weights)
            assert not ticket.done
        found = ticket.wait()
        assert torch.equal(found, expected) and found.dtype == dtype and ticket.done
        assert ticket.wait() is found


@pytest.mark.parametrize("isa", ISAS)
def test_the_instruction_set_is_that_of_the_submission(isa, experts, inputs):
    before = cpu.current_isa()
    cpu.use_isa(isa)
    try:
        expected = experts(*inputs)
        with held():
            ticket = experts.submit(*inputs)
            cpu.use_isa(before)
        assert torch.equal(ticket.wait(), expected)
    finally:
        cpu.use_isa(before)


def test_inputs_in_any_form(experts):
    x, ids, weights, _ = random_batch(SIZES, 2, 9)
    expected = experts(x, ids, weights)
    turned = x.t().contiguous().t(), ids.t().contiguous().t(), weights.t().contiguous().t()
    apart = torch.randn(9, 400).bfloat16()
    apart[:, : SIZES[1]] = x
    for given in (
        turned,
        (x, ids.int(), weights.double()),
        (apart[:, : SIZES[1]], ids, weights),
        (torch.nn.Parameter(x, requires_grad=False), ids, weights),
    ):
        assert torch.equal(experts.submit(*given).wait(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapters(experts, dtype):
    x, ids, weights, _ = random_batch(SIZES, 2, 9)
    factors = random_lora(SIZES, 4, dtype)
    shared = {**factors, "up_a": factors["gate_a"]}
    for lora in (
        ExpertLora(**factors, scaling=2.0),
        ExpertLora(**shared),
        ExpertLora(down_a=factors["down_a"], down_b=factors["down_b"]),
    ):
        expected = experts(x, ids, weights, lora)
        with held():
            ticket = experts.submit(x, ids, weights, lora)
        assert torch.equal(ticket.wait(), expected)
    ticket, plain = experts.submit(x, ids, weights), experts(x, ids, weights)
    assert torch.equal(ticket.wait(), plain) and experts._layer.adapted
    fresh = Experts.pack(*dense(SIZES), format="int8", activations="int8")
    with pytest.raises(ArgumentError, match="int8 activations are for inference"):
        fresh.submit(x, ids, weights, ExpertLora(**factors))


def test_many_in_order_waited_for_in_any(experts):
    batches = [Batch(1 + n % 40, 2).tensors(SIZES) for n in range(200)]
    expected = [experts(*batch) for batch in batches]
    with held():
        tickets = [experts.submit(*batch) for batch in batches]
        assert not any(ticket.done for ticket in tickets)
    order = list(range(200))
    random.Random(0).shuffle(order)
    for n in order:
        assert torch.equal(tickets[n].wait(), expected[n])
        assert all(ticket.done for ticket in tickets[: n + 1])


def test_threads_that_submit_wait_and_call(experts, threads):
    """Each waits for its neighbour's tickets; a synchronous call, and other threads in number, come in between."""
    batches = [Batch(tokens, 2).tensors(SIZES) for tokens in (1, 3, 17, 40)]
    expected = [experts(*batch) for batch in batches]
    tickets = [[] for _ in batches]
    wrong, ready = [], threading.Barrier(len(batches))

    def compute(number: int) -> None:
        for n in range(40):
            tickets[number].append(experts.submit(*batches[number]))
            if n % 3 == 0 and not torch.equal(experts(*batches[number]), expected[number]):
                wrong.append(number)
        ready.wait(300)
        for neighbour in (number, (number + 1) % len(batches)):
            if not all(torch.equal(ticket.wait(), expected[neighbour]) for ticket in tickets[neighbour]):
                wrong.append(neighbour)

    compute_at_once(compute, len(batches))
    assert not wrong
    assert sum(map(len, tickets)) == 160


def test_a_call_need_not_wait_for_the_queue(experts, inputs):
    with held():
        ticket = experts.submit(*inputs)
        found = experts(*inputs)
    assert torch.equal(ticket.wait(), found)


# --- errors ---


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("no_memory", "error"), [(True, MemoryError), (False, RuntimeError)])
def test_what_a_worker_throws_reaches_the_one_who_waits(count, no_memory, error, experts, inputs, threads):
    """Every time it is waited for; the tickets before and after it are computed."""
    expected = experts(*inputs)
    cpu.set_threads(count)
    for thread in range(count):
        with held():
            before = experts.submit(*inputs)
            failing = Ticket(_native.submit_throw_in_worker(thread, no_memory), torch.empty(0), torch.float32)
            after = experts.submit(*inputs)
        assert torch.equal(after.wait(), expected) and failing.done
        for _ in range(2):
            with pytest.raises(error, match=None if no_memory else "thrown by a worker") as caught:
                failing.wait()
            assert caught.type is error
        assert torch.equal(before.wait(), expected)


@pytest.mark.parametrize("wrong", [4, -2, 2**40])
def test_an_id_out_of_range(wrong, experts, inputs):
    x, ids, weights = inputs
    ids = ids.clone()
    ids[3, 1] = wrong
    with pytest.raises(ArgumentError, match=f"expert id {wrong} of token 3 is out of range"):
        experts.submit(x, ids, weights)


def test_shapes_dtypes_and_devices(experts, inputs):
    x, ids, weights = inputs
    for given, message in (
        ((x[:, 1:], ids, weights), r"x: expected shape \[tokens, 128\]"),
        ((x, ids[1:], weights), "ids: expected shape"),
        ((x, ids, weights[:, :1]), "weights: expected the shape of ids"),
        ((x.double(), ids, weights), "x: expected bfloat16"),
        ((x, ids.float(), weights), "ids: expected int64"),
        ((x.to("meta"), ids, weights), "x: expected a CPU tensor, found meta"),
    ):
        with pytest.raises(ArgumentError, match=message):
            experts.submit(*given)
    with pytest.raises(ArgumentError, match="only A"):
        experts.submit(*inputs, ExpertLora(gate_a=torch.zeros(4, 1, 128)))
    with pytest.raises(ArgumentError, match="do not have all their weights"):
        Experts(*SIZES, FORMATS[0]).submit(*inputs)


def test_gradients_are_not_computed_in_the_background(experts, inputs):
    x, ids, weights = inputs
    lora = ExpertLora(**random_lora(SIZES, 4, torch.float32))
    lora.up_b.requires_grad_()
    for given in (
        (x.clone().requires_grad_(), ids, weights),
        (x, ids, weights.clone().requires_grad_()),
        (*inputs, lora),
    ):
        with pytest.raises(ArgumentError, match="without gradients"):
            experts.submit(*given)
        with torch.no_grad():
            ticket = experts.submit(*given)
            assert torch.equal(ticket.wait(), experts(*given))
        assert not ticket.wait().requires_grad


def test_what_looks_on_is_refused(experts, inputs):
    x, ids, weights = inputs
    with pytest.raises(ArgumentError, match="plain CPU tensors"), FlopCounterMode(display=False):
        experts.submit(*inputs)
    with pytest.raises(ArgumentError, match="plain CPU tensors"):
        torch.func.vmap(lambda x: experts.submit(x, ids, weights).wait())(x[None])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = mode.from_tensor(x)
    with pytest.raises(ArgumentError, match="plain CPU tensors"):
        experts.submit(fake, ids, weights)


# --- what is kept alive ---


def array_of(tensor):
    """A tensor over memory of numpy's, and a weak reference to that memory."""
    array = tensor.numpy().copy()
    return torch.from_numpy(array), weakref.ref(array)


@pytest.mark.parametrize("spec", [FORMATS[0], FORMATS[6]], ids=name_of)
@pytest.mark.parametrize("keep", [True, False])
def test_all_that_is_read_lives_until_the_ticket_is_done(spec, keep, inputs):
    experts = Experts.pack(*dense(SIZES), **options(spec), up_bias=torch.ones(4, 256))
    made = {name: array_of(factor) for name, factor in random_lora(SIZES, 4, torch.float32).items()}
    lora, (x, memory) = ExpertLora(**{name: tensor for name, (tensor, _) in made.items()}), array_of(inputs[0])
    expected = experts(x, *inputs[1:], lora)
    held_by = [memory, *(ref for _, ref in made.values()), weakref.ref(experts._layer)]
    held_by += [weakref.ref(t) for t in (*experts._weights.values(), *experts._biases.values())]
    with held():
        ticket = experts.submit(x, *inputs[1:], lora)
        del experts, lora, made, x
        if not keep:
            del ticket
        gc.collect()
        assert all(ref() is not None for ref in held_by)
    other = packed(spec, SIZES)
    if keep:
        assert torch.equal(ticket.wait(), expected)
    else:
        other.submit(*inputs).wait()
    assert all(ref() is None for ref in held_by)


def test_a_ticket_that_nobody_waits_for_is_let_go(experts, inputs):
    x, memory = array_of(inputs[0])
    ticket = experts.submit(x, *inputs[1:])
    experts.submit(*inputs).wait()
    del x
    assert ticket.done and memory() is not None
    del ticket
    assert memory() is None


def test_dropping_some_of_many(experts):
    """Dropped before, while and after they are computed; the others are not disturbed."""
    batches = [Batch(1 + n % 40, 2).tensors(SIZES) for n in range(300)]
    expected = [experts(*batch) for batch in batches]
    kept = {}
    for n, batch in enumerate(batches):
        ticket = experts.submit(batch[0].clone(), *batch[1:])
        if n % 3 == 0:
            kept[n] = ticket
    assert all(torch.equal(ticket.wait(), expected[n]) for n, ticket in kept.items())


def test_what_is_let_go_may_submit(experts, inputs):
    """Letting go of a dropped ticket's inputs runs Python code: here one that submits and drops in turn."""
    expected, seen = experts(*inputs), []

    def again(_):
        seen.append(experts.submit(*inputs))
        experts.submit(*inputs)

    x, memory = array_of(inputs[0])
    watch = weakref.ref(memory(), again)
    with held():
        experts.submit(x, *inputs[1:])
        del x
    experts.submit(*inputs).wait()
    assert watch() is None and torch.equal(seen[0].wait(), expected)


def test_changes_after_the_submission(experts, inputs):
    """Ids and weights may be used again at once; x and adapters may get other memory."""
    ids, weights = (t.clone() for t in inputs[1:])
    made = [array_of(t) for t in (inputs[0], *random_lora(SIZES, 4, torch.float32).values())]
    (x, *factors), memory = zip(*made, strict=True)
    lora = ExpertLora(*factors)
    expected = experts(x, ids, weights, lora)
    with held():
        ticket = experts.submit(x, ids, weights, lora)
        ids.fill_(2**40)
        weights.zero_()
        for tensor in (x, *factors):
            tensor.data = torch.zeros(1)
        del made, tensor
        assert all(array() is not None for array in memory)
    assert torch.equal(ticket.wait(), expected)
