"""Layers whose down has another format than gate and up: on every instruction set, forward and backward."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, Batch, assert_close, dense, dense_of, engine_truth, name_of, packed
from gradient_cases import random_batch, random_lora
from gradient_truth import compare

from coterie import Experts
from coterie.errors import ArgumentError
from coterie.formats import Formats, resolve

NAMED = {name_of(spec): spec for spec in FORMATS}
# Steps of all widths, scales of all kinds, and both kinds of activations.
KINDS = ("bf16-row", "int8-row", "int4-64-zero", "fp8_block-128", "nvfp4-16", "q4_k-256", "int4-row", "q5_1-32")
PAIRS = [Formats(NAMED[KINDS[n]], NAMED[KINDS[n - apart]]) for apart in (1, 3) for n in range(len(KINDS))]
OF_GGUF = [Formats(resolve(a), resolve(b)) for a, b in (("q4_k", "q6_k"), ("q2_k", "q4_0"), ("iq4_xs", "q8_0"))]
# Columns that are no whole steps of 256; a last block that is narrow, in both directions.
SIZES = [(4, 128, 256), (3, 320, 192)]


def mixed(formats: Formats, sizes: tuple[int, int, int]) -> Experts:
    return Experts.pack(*dense(sizes), format=formats)


@pytest.mark.parametrize("formats", [*PAIRS, *OF_GGUF], ids=name_of)
def test_forward(isa, formats):
    for sizes in SIZES:
        experts = mixed(formats, sizes)
        for batch in (Batch(1, 2), Batch(7, 1), Batch(40, 2), Batch(33, 1, spread=False)):
            x, ids, weights = batch.tensors(sizes)
            assert_close(formats, experts(x, ids, weights), engine_truth(experts, isa, x, ids, weights), batch)


@pytest.mark.parametrize("formats", PAIRS[::2] + OF_GGUF, ids=name_of)
def test_every_gradient(isa, formats):
    for sizes in SIZES[: 2 if formats in OF_GGUF else 1]:
        compare(mixed(formats, sizes), random_batch(sizes, 2, 40), random_lora(sizes, 8, torch.float32))


@pytest.mark.parametrize("formats", [*PAIRS, *OF_GGUF], ids=name_of)
def test_each_matrix_is_that_of_its_format(formats):
    experts = mixed(formats, SIZES[0])
    expected = dense_of(packed(formats.gate_up, SIZES[0])) | {"down": dense_of(packed(formats.down, SIZES[0]))["down"]}
    for name, found in dense_of(experts).items():
        assert torch.equal(found, expected[name])
    assert experts.formats == formats and experts.spec is None


def test_activations_are_int8_where_both_formats_allow_it():
    x, ids, weights = Batch(5, 2).tensors(SIZES[0])
    for a, b, int8 in (("q4_k", "q6_k", True), ("int8", "bf16", False), ("fp8_channel", "int4", False)):
        formats = Formats(resolve(a), resolve(b))
        experts = mixed(formats, SIZES[0])
        found = experts(x, ids, weights)
        experts.activations = "bf16"
        assert torch.equal(experts(x, ids, weights), found) != int8
        if int8:
            experts.activations = "int8"
            assert torch.equal(experts(x, ids, weights), found)
            continue
        with pytest.raises(ArgumentError, match=f"int8.*those of {a}/{b} are computed with bf16"):
            experts.activations = "int8"


def test_what_it_says_of_itself():
    experts = mixed(OF_GGUF[0], SIZES[0])
    assert experts.format == "q4_k/q6_k"
    assert "4 x 128 x 256, q4_k in groups of 256 with down in q6_k in groups of 256, " in repr(experts)
    chosen = experts.select([2, None])
    assert chosen.formats == experts.formats and torch.equal(chosen.packed(0), experts.packed(2))


def test_columns_that_groups_do_not_divide():
    with pytest.raises(ArgumentError, match="down: 192 columns are not a multiple of group_size=128"):
        Experts.empty(1, 256, 192, format=Formats(resolve("q4_k"), resolve("int4", 128)))
    with pytest.raises(ArgumentError, match="gate and up: 192 columns are not a multiple of group_size=128"):
        Experts.empty(1, 192, 256, format=Formats(resolve("int4", 128), resolve("q4_k")))
