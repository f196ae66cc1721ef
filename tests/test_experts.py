"""Experts: made from dense weights or packed bytes, what they refuse, and the memory they take."""

from __future__ import annotations

import copy as copies
import gc
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from engine_cases import FORMATS, Batch, dense, made_of, name_of, packed

from coterie import Activation, Experts
from coterie.errors import ArgumentError

SIZES = (3, 128, 256)


def all_of(experts):
    return [experts.packed(e) for e in range(experts.num_experts)]


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_bytes_are_used_where_they_lie(spec):
    original, inputs = packed(spec, SIZES), Batch(20, 2).tensors(SIZES)
    given = [data.clone() for data in all_of(original)]
    made = made_of(spec, SIZES, lambda e: given[e])
    assert repr(made) == repr(original) and made.nbytes == original.nbytes
    assert all(data.data_ptr() == same.data_ptr() for data, same in zip(all_of(made), given, strict=True))
    given.clear()
    gc.collect()
    assert torch.equal(made(*inputs), original(*inputs))


@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_packed_bytes_need_no_alignment(isa, spec, offset):
    """A memory map may begin anywhere."""

    def shifted(e):
        data = packed(spec, SIZES).packed(e)
        memory = torch.empty(data.numel() + offset, dtype=torch.uint8)
        return memory[offset:].copy_(data)

    made, inputs = made_of(spec, SIZES, shifted), Batch(20, 2).tensors(SIZES)
    assert torch.equal(made(*inputs), packed(spec, SIZES)(*inputs))
    assert torch.equal(made.dequantize_projection("up", 1), packed(spec, SIZES).dequantize_projection("up", 1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda d: d[:-1], r"expected shape \[102400\], found \[102399\]"),
        (lambda d: d.view(torch.int8), "found torch.int8"),
        (lambda d: torch.stack([d, d], 1)[:, 0], "expected values adjacent in memory"),
        (lambda d: d.to("meta"), "expected a plain CPU tensor, found Tensor on meta"),
    ],
)
def test_bytes_that_are_refused(wrong, message):
    spec = FORMATS[1]
    with pytest.raises(ArgumentError, match=f"expert 0: {message}"):
        made_of(spec, SIZES, lambda e: wrong(packed(spec, SIZES).packed(e)))


def test_pack_is_empty_and_then_each_projection():
    gate, up, down = dense(SIZES)
    experts = Experts.empty(*SIZES, format="int8")
    for e in reversed(range(SIZES[0])):
        for name, weights in (("down", down), ("gate", gate), ("up", up)):
            experts.pack_projection(name, e, weights[e])
    expected = packed(FORMATS[1], SIZES)
    assert all(torch.equal(a, b) for a, b in zip(all_of(experts), all_of(expected), strict=True))


def test_empty_answers_zero():
    assert not Experts.empty(*SIZES)(*Batch(3, 2).tensors(SIZES)).any()


GATE, UP, DOWN = dense(SIZES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"up": UP[0]}, r"up: expected \[experts, intermediate, hidden\], found shape \[256, 128\]"),
        ({"gate": GATE[:2]}, r"gate: expected shape \[3, 256, 128\], found \[2, 256, 128\]"),
        ({"down": UP}, r"down: expected shape \[3, 128, 256\], found \[3, 256, 128\]"),
        ({"up": UP.double()}, "up: expected bfloat16, float16 or float32, found torch.float64"),
        ({"down": DOWN.to("meta")}, "down: expected a CPU tensor, found meta"),
        ({"gate": GATE.clone().requires_grad_()}, "gate: packed weights are frozen"),
        ({"up": UP.mT.contiguous().mT}, r"up.*: expected columns adjacent in memory.*call .contiguous\(\)"),
        ({"up": UP[:0], "gate": GATE[:0], "down": DOWN[:0]}, "num_experts: expected at least 1, found 0"),
        ({"format": "fp7"}, "unknown format 'fp7'"),
        ({"group_size": 48}, "group_size of int4: expected"),
        ({"up_bias": torch.zeros(3, 128)}, r"up_bias: expected shape \[3, 256\], found \[3, 128\]"),
        ({"down_bias": torch.zeros(128)}, r"down_bias: expected shape \[3, 128\], found \[128\]"),
        ({"gate": None, "gate_bias": torch.zeros(3, 256)}, "gate_bias: these experts have no gate"),
    ],
)
def test_pack_refuses(given, message):
    arguments = {"gate": GATE, "up": UP, "down": DOWN} | given
    with pytest.raises(ArgumentError, match=message):
        Experts.pack(**arguments)


@pytest.mark.parametrize(("name", "expert"), [("left", 0), ("up", 3), ("up", -1), ("gate", 0)])
def test_pack_projection_names_what_there_is(name, expert):
    experts = Experts.empty(*SIZES, has_gate=False)
    with pytest.raises(ArgumentError, match=r"no '\w+' of expert -?\d: expected \('up', 'down'\), experts 0..2"):
        experts.pack_projection(name, expert, UP[0])


def test_unknown_activation():
    with pytest.raises(ArgumentError, match="unknown activation 'swish': expected one of silu, gelu"):
        Activation("swish")


def run(script):
    program = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", textwrap.dedent(script)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer has memory of its own")
def test_memory_is_the_packed_bytes_and_is_given_back():
    run("""
        import gc, pathlib, torch
        from coterie import Experts

        def status(key):
            lines = pathlib.Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))

        MB = 1 << 20
        gate, up, down = torch.randn(3, 24, 1024, 512).bfloat16()
        down = down.mT.contiguous()
        x, ids, weights = torch.randn(4, 512), torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1)
        Experts.pack(gate[:1], up[:1], down[:1])(x, ids, weights)
        gc.collect()
        before = status("VmRSS")
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        experts = Experts.pack(gate, up, down, format="int8", scale_search=False)
        assert experts.nbytes > 36 * MB
        kept, peak = status("VmRSS") - before, status("VmHWM") - before
        assert abs(kept - experts.nbytes) < 8 * MB, (kept, experts.nbytes)
        assert peak < experts.nbytes + 20 * MB, (peak, experts.nbytes)
        experts(x, ids, weights)
        del experts
        gc.collect()
        assert status("VmRSS") - before < 8 * MB
    """)


def test_copies_share_the_weights():
    experts = Experts.pack(*dense(SIZES))
    experts(*Batch(2, 1).tensors(SIZES))
    model = {"layer": experts}
    assert copies.deepcopy(model)["layer"] is experts and copies.copy(experts) is experts
    with pytest.raises(ArgumentError, match=r"cannot be pickled; write them with save\(\)"):
        pickle.dumps(model)


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_selected_experts_are_the_same_in_the_same_memory(spec):
    experts = packed(spec, SIZES)
    slots = [2, None, 0, 2, None]
    chosen = experts.select(slots)
    assert chosen.num_experts == 5 and chosen.spec == spec
    for slot, expert in enumerate(slots):
        assert expert is None or chosen.packed(slot).data_ptr() == experts.packed(expert).data_ptr()
    assert chosen.packed(1).data_ptr() == chosen.packed(4).data_ptr() and not chosen.packed(1).any()
    x, _, weights = Batch(6, 2).tensors(SIZES)
    ids = torch.tensor([[0, 2], [1, 2], [3, 4], [0, 0], [-1, 3], [1, 4]])
    known = torch.tensor([2, -1, 0, 2, -1, -1])
    assert torch.equal(chosen(x, ids, weights), experts(x, known[ids], weights))


def test_selected_experts_keep_biases_and_activation():
    gate, up, down = dense(SIZES)
    count, hidden, intermediate = SIZES
    up_bias, down_bias = torch.randn(count, intermediate), torch.randn(count, hidden)
    experts = Experts.pack(
        gate, up, down, format="bf16", activation=Activation("gelu"), up_bias=up_bias, down_bias=down_bias
    )
    chosen = experts.select([1, None])
    assert chosen.activation == experts.activation
    assert torch.equal(chosen.biases()["up"], torch.stack([up_bias[1], torch.zeros(intermediate)]))
    assert torch.equal(chosen.biases()["down"], torch.stack([down_bias[1], torch.zeros(hidden)]))
    for wrong in (count, -1):
        with pytest.raises(ArgumentError, match=f"slot 1: expected an expert 0..{count - 1}, found {wrong}"):
            experts.select([0, wrong])
