"""Caches that are appended to where they lie, beside Transformers' own."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import coterie
from coterie import tiny
from coterie.hf.inference.growing import GrowingLayer, GrowingSlidingLayer

WINDOW = 6


def states(positions: int, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(positions)
    return tuple(torch.randn(batch, 3, positions, 8, generator=random) for _ in range(2))


def both(*appended: int) -> tuple[GrowingLayer, DynamicLayer]:
    layers = GrowingLayer(), DynamicLayer()
    for positions in appended:
        for layer in layers:
            layer.update(*states(positions))
    return layers


def check(layer: DynamicLayer, expected: DynamicLayer) -> None:
    assert layer.get_seq_length() == expected.get_seq_length()
    assert torch.equal(layer.keys, expected.keys) and torch.equal(layer.values, expected.values)


def test_values_and_what_update_gives():
    layer, expected = both(5, 1, 1, 200, 1)
    found, wanted = layer.update(*states(2)), expected.update(*states(2))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    check(layer, expected)


def test_tokens_are_appended_in_place():
    layer, _ = both(100)
    layer.update(*states(1))
    at, before = layer.keys.data_ptr(), layer.keys
    for _ in range(20):
        layer.update(*states(1))
    assert layer.keys.data_ptr() == at and torch.equal(layer.keys[:, :, :101], before)


@pytest.mark.parametrize("kind", [copy.copy, copy.deepcopy])
def test_copies_go_their_own_ways(kind):
    layer, expected = both(10, 1)
    other, wanted = kind(layer), copy.deepcopy(expected)
    for each, plain, positions in ((layer, expected, 2), (other, wanted, 3), (layer, expected, 1)):
        each.update(*states(positions))
        plain.update(*states(positions))
    check(layer, expected)
    check(other, wanted)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-3),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_select_indices(torch.tensor([1, 1])),
        lambda layer: layer.reset(),
    ],
)
def test_what_changes_a_cache(change):
    layer, expected = both(10, 1)
    kept = layer.keys
    before = kept.clone()
    for each in (layer, expected):
        change(each)
        each.update(*states(2))
        each.update(*states(1))
    check(layer, expected)
    assert torch.equal(kept, before)  # an older view is not written over


def both_sliding() -> tuple[GrowingSlidingLayer, DynamicSlidingWindowLayer]:
    return GrowingSlidingLayer(WINDOW), DynamicSlidingWindowLayer(WINDOW)


def check_sliding(layer: GrowingSlidingLayer, expected: DynamicSlidingWindowLayer, positions: int) -> None:
    found, wanted = (each.update(*states(positions)) for each in (layer, expected))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    check(layer, expected)
    assert layer.get_mask_sizes(1) == expected.get_mask_sizes(1)


@pytest.mark.parametrize("prompt", [1, 3, WINDOW - 1, WINDOW, 50])
def test_a_window(prompt):
    layer, expected = both_sliding()
    check_sliding(layer, expected, prompt)
    places = set()
    for _ in range(150):
        check_sliding(layer, expected, 1)
        places.add(layer.rooms[0].memory.data_ptr())
    assert len(places) < 5
    check_sliding(layer, expected, 4)
    check_sliding(layer, expected, 1)


@pytest.mark.parametrize("kind", [copy.copy, copy.deepcopy])
def test_copies_of_a_window_go_their_own_ways(kind):
    layer, expected = both_sliding()
    check_sliding(layer, expected, 10)
    other, wanted = kind(layer), copy.deepcopy(expected)
    for _ in range(3):
        check_sliding(layer, expected, 1)
    for _ in range(2):
        check_sliding(other, wanted, 1)
    check_sliding(layer, expected, 1)


@pytest.mark.skipif(not hasattr(DynamicSlidingWindowLayer, "activate_past_recording"), reason="Transformers is older")
def test_a_window_that_tokens_are_taken_back_from():
    layer, expected = both_sliding()
    check_sliding(layer, expected, 4)
    for each in (layer, expected):
        each.activate_past_recording()
    check_sliding(layer, expected, 1)
    assert not layer.has_room()
    check_sliding(layer, expected, 5)
    for each in (layer, expected):
        each.crop(-2)
    check(layer, expected)
    check_sliding(layer, expected, 1)


def test_gradients_flow():
    layer, _ = both(4)
    keys, values = (t.requires_grad_() for t in states(1))
    layer.update(keys, values)
    (layer.keys.sum() + layer.values.sum()).backward()
    assert keys.grad.eq(1).all()


def test_made_in_inference_mode_and_used_outside():
    layer, expected = GrowingLayer(), DynamicLayer()
    with torch.inference_mode():
        for each in (layer, expected):
            each.update(*states(5))
    with torch.no_grad():
        for each in (layer, expected):
            each.update(*states(1))
    check(layer, expected)


def test_a_model_makes_its_caches_such():
    model = coterie.from_pretrained(tiny.PATH, experts="bf16")
    ids = torch.arange(4, 16)[None]
    for cache in (DynamicCache(config=model.config), DynamicCache()):
        with torch.inference_mode():
            whole = model(ids).logits
            model(ids[:, :8], past_key_values=cache)
            last = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(8, 12)]
        assert all(type(layer) is GrowingLayer for layer in cache.layers)
        assert (torch.cat(last, 1) - whole[:, 8:]).norm() < 0.01 * whole[:, 8:].norm()
    offloaded = copy.deepcopy(model.config)
    assert type(DynamicCache(config=offloaded).layers[0]) is DynamicLayer  # others' caches are left alone
