"""Weights from tensors and from checkpoints, in slots; experts on the GPU are not loaded."""

from __future__ import annotations

import json

import pytest
import torch
from kt_cases import IDENTITY, E, H, I, batch, close, dense, loaded, wrapper
from made_checkpoints import CONFIG, separate, write_checkpoint

from coterie import Experts, reference
from coterie.convert import convert_cpu
from coterie.errors import CheckpointError, StateError
from coterie.formats import Formats, resolve

SHUFFLED = torch.tensor([3, 1, 0, 7, 5, 6, 2, 4])


def plain_checkpoint(folder, experts=E):
    """Layers 0 and 1, of `dense(0)` and `dense(1)`."""
    config = {**CONFIG, "num_experts": experts}
    tensors = {}
    for layer in range(2):
        parts = dict(zip(("gate", "up", "down"), dense(layer, experts), strict=True))
        tensors |= separate(f"model.layers.{layer}.mlp.experts", parts)
    return str(write_checkpoint(folder, {n: t.contiguous() for n, t in tensors.items()}, config))


def test_slots_hold_the_experts_of_the_map():
    hidden, ids, weights = batch(5)
    for method in ("BF16", "AMXINT8"):
        plain, shuffled = loaded(method=method), loaded(method=method, slots=SHUFFLED)
        assert torch.equal(shuffled.forward(hidden, ids, weights), plain.forward(hidden, SHUFFLED[ids], weights))


def test_an_expert_may_be_in_two_slots():
    slots = torch.tensor([0, 0, 2, 3, 4, 5, 6, 7])
    hidden, ids, weights = batch(3)
    assert torch.equal(
        loaded(slots=slots).forward(hidden, ids, weights), loaded().forward(hidden, slots[ids], weights)
    )


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        (torch.arange(E - 1), r"expected int64 \[8\], found torch.int64 \[7\]"),
        (torch.arange(E).float(), "found torch.float32"),
        (torch.arange(E) + 1, "expected experts 0..7, found 8"),
        (torch.arange(E) - 1, "expected experts 0..7, found -1"),
    ],
)
def test_maps_that_do_not_fit(slots, message):
    with pytest.raises(ValueError, match=message):
        loaded(slots=slots)


def test_shapes_that_do_not_fit():
    gate, up, down = dense()
    with pytest.raises(ValueError, match=r"down_proj: expected shape \[8, 128, 64\], found \[8, 64, 128\]"):
        wrapper().load_weights_from_tensors(gate, up, up, IDENTITY)
    with pytest.raises(ValueError, match=r"gate_proj: expected shape"):
        wrapper().load_weights_from_tensors(gate[1:], up, down, IDENTITY)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_parameters_of_any_float_dtype(dtype):
    made = wrapper(method="BF16")
    parameters = [torch.nn.Parameter(w.to(dtype)) for w in dense()]
    made.load_weights_from_tensors(*parameters, IDENTITY)
    hidden, ids, weights = batch(4)
    close(made.forward(hidden, ids, weights), reference.forward(hidden, ids, weights, *dense()))


def test_experts_on_the_gpu_add_nothing_and_take_no_memory():
    mask = torch.zeros(E, dtype=torch.bool)
    mask[[1, 4, 6]] = True
    hidden, ids, weights = batch(6)
    there = mask[ids]
    assert there.any() and not there.all()
    for mode in ({"gpu_experts_mask": mask}, {"num_gpu_experts": 3}):
        made = loaded(method="AMXINT8", **mode)
        on_gpu = mask if "gpu_experts_mask" in mode else torch.arange(E) < 3
        expected = loaded(method="AMXINT8").forward(hidden, ids.masked_fill(on_gpu[ids], -1), weights)
        assert torch.equal(made.forward(hidden, ids, weights), expected)
        held = {made.experts.packed(e).data_ptr() for e in range(E)}
        assert len(held) == E - 3 + 1 and torch.equal(made.gpu_experts_mask, on_gpu)
    with pytest.raises(ValueError, match=r"expected -1 or 0..7, found 8"):
        made.forward(hidden, ids + 1, weights)


def test_all_experts_on_the_gpu():
    made = loaded(gpu_experts_mask=torch.ones(E, dtype=torch.bool))
    assert not made.forward(*batch(3)).any()


def test_experts_on_the_gpu_are_not_read_from_a_checkpoint(tmp_path):
    path = plain_checkpoint(tmp_path / "plain")
    mask = torch.zeros(E, dtype=torch.bool)
    mask[SHUFFLED == 5] = True
    # Were expert 5 read, its NaN would be refused.
    gate, up, down = dense()
    gate[5] = torch.nan
    parts = {"gate": gate, "up": up, "down": down}
    write_checkpoint(tmp_path / "nan", separate("model.layers.0.mlp.experts", parts), {**CONFIG, "num_experts": E})
    made = wrapper(weight_path=str(tmp_path / "nan"), gpu_experts_mask=mask)
    made.load_weights(SHUFFLED)
    whole = wrapper(weight_path=path, gpu_experts_mask=mask)
    whole.load_weights(SHUFFLED)
    assert torch.equal(made.forward(*batch(4)), whole.forward(*batch(4)))
    with pytest.raises(ValueError, match="NaN"):
        wrapper(weight_path=str(tmp_path / "nan")).load_weights(SHUFFLED)


@pytest.mark.parametrize("method", ("AMXINT4", "AMXINT8", "BF16", "FP8"))
def test_a_plain_checkpoint_is_packed_as_it_is_read(tmp_path, method):
    made = wrapper(weight_path=plain_checkpoint(tmp_path), method=method, layer_idx=1)
    made.load_weights(SHUFFLED)
    expected = loaded(seed=1, slots=SHUFFLED, method=method)
    assert torch.equal(made.forward(*batch(4)), expected.forward(*batch(4)))


def test_a_packed_checkpoint_is_opened_as_it_is(tmp_path):
    path = plain_checkpoint(tmp_path / "plain")
    convert_cpu(path, tmp_path / "packed", "int8")
    made = wrapper(weight_path=str(tmp_path / "packed"), method="AMXINT8", layer_idx=1)
    made.load_weights(SHUFFLED)
    assert torch.equal(made.forward(*batch(4)), loaded(1, SHUFFLED, method="AMXINT8").forward(*batch(4)))
    with pytest.raises(CheckpointError, match="packed as int8, method AMXINT4 expects int4"):
        wrapper(weight_path=str(tmp_path / "packed"), method="AMXINT4").load_weights(SHUFFLED)
    with pytest.raises(CheckpointError, match="no layer 2"):
        wrapper(weight_path=str(tmp_path / "packed"), method="AMXINT8", layer_idx=2).load_weights(SHUFFLED)


def test_groups_of_a_packed_checkpoint_are_its_own(tmp_path):
    convert_cpu(plain_checkpoint(tmp_path / "plain"), tmp_path / "packed", "int4", 64)
    made = wrapper(weight_path=str(tmp_path / "packed"))
    made.load_weights(IDENTITY)
    assert made.experts.spec.group_size == 64


def test_a_packed_checkpoint_of_two_formats(tmp_path):
    """Groups may differ; for another format than the method's there is no way."""
    parts = dense()
    Experts.pack(*parts, format=Formats(resolve("int4", 64), resolve("int4", 32))).save(tmp_path / "groups")
    made = wrapper(weight_path=str(tmp_path / "groups"))
    made.load_weights(IDENTITY)
    assert made.experts.formats == Formats(resolve("int4", 64), resolve("int4", 32))
    Experts.pack(*parts, format=Formats(resolve("int4"), resolve("int8"))).save(tmp_path / "formats")
    with pytest.raises(CheckpointError, match="packed as int4/int8, method AMXINT4 expects int4"):
        wrapper(weight_path=str(tmp_path / "formats")).load_weights(IDENTITY)


def test_biases_of_a_checkpoint_go_to_their_slots(tmp_path):
    gate, up, down = dense()
    biases = {"gate_bias": torch.randn(E, I), "up_bias": torch.randn(E, I), "down_bias": torch.randn(E, H)}
    Experts.pack(gate, up, down, format="bf16", **biases).save(tmp_path, layer=0)
    mask = SHUFFLED == 5
    made = wrapper(weight_path=str(tmp_path), method="BF16", gpu_experts_mask=mask)
    made.load_weights(SHUFFLED)
    hidden, ids, weights = batch(5)
    known = SHUFFLED[ids].masked_fill(mask[ids], -1)
    close(made.forward(hidden, ids, weights), reference.forward(hidden, known, weights, *dense(), **biases))


def test_what_is_quantised_on_line_is_saved(tmp_path):
    path = str(tmp_path / "packed")
    for layer in range(2):
        made = loaded(layer, SHUFFLED, layer_idx=layer, weight_path=path, cpu_save=True)
        read = wrapper(layer_idx=layer, weight_path=path)
        read.load_weights(SHUFFLED)
        assert torch.equal(read.forward(*batch(4)), made.forward(*batch(4)))
    unsaved = tmp_path / "nothing"
    loaded(weight_path=str(unsaved))
    assert not unsaved.exists()
    with pytest.raises(ValueError, match="cpu_save writes whole layers"):
        wrapper(weight_path=path, cpu_save=True, num_gpu_experts=1)


def test_the_activation_is_the_checkpoints(tmp_path):
    path = plain_checkpoint(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**CONFIG, "num_experts": E, "model_type": "deepseek_v4"}))
    made = wrapper(weight_path=path)
    made.load_weights(IDENTITY)
    assert made.experts.activation.limit == 10
    changed = wrapper(weight_path=path, swiglu_limit=7.0)
    changed.load_weights(IDENTITY)
    assert changed.experts.activation.limit == 7


@pytest.mark.parametrize("mode", ({"mode": "inference"}, {"mode": "sft", "method": "AMXBF16_SFT"}))
def test_weights_that_were_set_are_packed_and_let_go_of(mode):
    made = wrapper(**mode)
    with pytest.raises(RuntimeError, match=r"give weight_path to KTMoEWrapper, or call load_weights_from_tensors\(\)"):
        made.load_weights(IDENTITY)
    made.gate_proj, made.up_proj, made.down_proj = dense()
    made.load_weights(IDENTITY)
    assert made.gate_proj is None and made.up_proj is None and made.down_proj is None
    assert (made.experts.hidden_size, made.experts.intermediate_size) == (H, I)


def test_a_load_that_fails_leaves_what_was_there():
    made = loaded(method="AMXINT8")
    expected = made.forward(*batch(2))
    gate, up, down = dense(1)
    gate[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        made.load_weights_from_tensors(gate, up, down, IDENTITY)
    assert torch.equal(made.forward(*batch(2)), expected)


def test_a_forward_without_weights():
    with pytest.raises(StateError, match=r"call load_weights\(\) or load_weights_from_tensors\(\) first"):
        wrapper().forward(*batch(2))
