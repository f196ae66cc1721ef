"""Saving and opening packed layers: the same bits, whichever way they are opened; what is wrong with a file is said."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from made_checkpoints import random_experts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from coterie import Experts
from coterie.activations import Activation
from coterie.checkpoints import LayerWriter, open_layer, packed, write_layer
from coterie.checkpoints.packed import UNFINISHED, PackedLayer, layer_file, packed_layers, read_layout
from coterie.checkpoints.tensorfile import TensorFile
from coterie.errors import CheckpointError
from coterie.formats import Formats, resolve

SPECS = [
    {"format": "bf16"},
    {"format": "int8"},
    {"format": "int8", "group_size": 64},
    {"format": "int4"},
    {"format": "int4", "group_size": 64, "zero_point": True},
    {"format": "int4", "group_size": 0},
    {"format": "int4", "group_size": 0, "zero_point": True},
]
# Neither rows nor columns fill their panels, where the group size allows.
SIZES = (3, 192, 64)
ODD = (2, 70, 33)


def experts_of(spec, sizes=SIZES, **more):
    return Experts.pack(**random_experts(1, sizes=sizes), **spec, **more)


def open_packed(path, layer=0, mmap=False):
    return Experts.from_packed(open_layer(path, layer), mmap)


def same(a, b):
    return a.num_experts == b.num_experts and all(torch.equal(a.packed(e), b.packed(e)) for e in range(a.num_experts))


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_round_trip(tmp_path, spec, mmap):
    saved = experts_of(spec)
    saved.save(tmp_path, layer=3)
    assert os.listdir(tmp_path) == ["experts-00003.safetensors"]
    opened = Experts.open(tmp_path, layer=3, mmap=mmap)
    assert same(saved, opened)
    assert (opened.spec, opened.activation, opened.has_gate) == (saved.spec, saved.activation, True)
    x, ids, weights = torch.randn(5, SIZES[1]), torch.randint(0, SIZES[0], (5, 2)), torch.rand(5, 2)
    assert torch.equal(saved(x, ids, weights), opened(x, ids, weights))
    assert all(torch.equal(a, b) for a, b in zip(saved.dequantize(), opened.dequantize(), strict=True))


@pytest.mark.parametrize("mmap", [False, True], ids=["read", "mmap"])
@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_round_trip_of_odd_sizes(tmp_path, name, mmap):
    saved = experts_of({"format": name, "group_size": 0}, ODD)
    saved.save(tmp_path / "one.safetensors", layer=0)
    opened = Experts.open(tmp_path / "one.safetensors", mmap=mmap)
    assert same(saved, opened)
    assert (opened.num_experts, opened.hidden_size, opened.intermediate_size) == ODD


def test_biases_and_activation_and_no_gate(tmp_path):
    count, hidden, intermediate = SIZES
    biases = {
        "gate_bias": torch.randn(count, intermediate),
        "up_bias": torch.randn(count, intermediate),
        "down_bias": torch.randn(count, hidden),
    }
    activation = Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0)
    experts_of({"format": "bf16"}, activation=activation, **biases).save(tmp_path, layer=0)
    for mmap in (False, True):
        opened = Experts.open(tmp_path, mmap=mmap)
        assert opened.activation == activation
        assert all(torch.equal(bias, biases[f"{part}_bias"]) for part, bias in opened.biases().items())
        assert list(opened.biases()) == ["gate", "up", "down"]

    weights = random_experts(1, sizes=SIZES) | {"gate": None}
    Experts.pack(**weights, format="int8", activation=Activation("relu2")).save(tmp_path, layer=1)
    opened = Experts.open(tmp_path, layer=1)
    assert not opened.has_gate and opened.activation.kind == "relu2" and opened.dequantize()[0] is None


def test_the_bytes_on_disk_are_the_bytes_in_memory_aligned(tmp_path):
    experts = experts_of({"format": "int4", "zero_point": True})
    write_layer(tmp_path, 5, experts, source="somewhere")
    tensors = load_file(layer_file(tmp_path, 5))
    expected = {f"blk.5.ffn_exps.{e}": experts.packed(e) for e in range(3)}
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], data) for name, data in expected.items())
    file = TensorFile(layer_file(tmp_path, 5))
    assert all((file.data_start + entry.start) % 4096 == 0 for entry in file.entries.values())
    assert sum(e.nbytes for e in file.entries.values()) == experts.nbytes == read_layout(file).nbytes
    assert file.metadata == {
        "format": "pt",
        "coterie.version": "2.0",
        "coterie.experts": "int4",
        "coterie.group_size": "32",
        "coterie.zero_point": "true",
        "coterie.num_experts": "3",
        "coterie.hidden_size": "192",
        "coterie.intermediate_size": "64",
        "coterie.layer": "5",
        "coterie.has_gate": "true",
        "coterie.activation": '{"kind": "silu", "alpha": 1.0, "limit": 0.0, "up_offset": 0.0}',
        "coterie.source": "somewhere",
    }


def test_the_documented_example_reads_the_right_weights(tmp_path):
    document = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    example = {}
    exec(re.search(r"```python\n(.*?)```", document, re.DOTALL)[1], example)
    experts = experts_of({"format": "int4"})
    experts.save(tmp_path, layer=2)
    for projection in ("gate", "up", "down"):
        expected = experts.dequantize_projection(projection, 1)
        for n, k in torch.randint(0, 64, (50, 2)).tolist():
            assert example["int4_weight"](tmp_path, 2, projection, 1, n, k) == expected[n, k]


def test_experts_written_one_at_a_time(tmp_path):
    whole = experts_of({"format": "int8"})
    write_layer(tmp_path / "whole", 0, whole)
    layout = read_layout(TensorFile(layer_file(tmp_path / "whole", 0)))
    with LayerWriter(tmp_path, layout) as writer:
        for expert in (2, 0, 1):
            one = Experts.pack(
                *(w[expert : expert + 1] for w in random_experts(1, sizes=SIZES).values()), format="int8"
            )
            writer.write_experts(one, expert)
    assert layer_file(tmp_path, 0).read_bytes() == layer_file(tmp_path / "whole", 0).read_bytes()


def test_an_interrupted_save_keeps_what_was_there(tmp_path):
    experts_of({"format": "int8"}).save(tmp_path)
    before = layer_file(tmp_path, 0).read_bytes()
    layout = PackedLayer(
        layer=0, num_experts=2, hidden_size=64, intermediate_size=64,
        formats=Formats.of(resolve("int8")), has_gate=True, activation=Activation(),
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt), LayerWriter(tmp_path, layout):
        raise KeyboardInterrupt
    with pytest.raises(CheckpointError, match="2 tensors were not written"):
        LayerWriter(tmp_path, layout).__enter__().__exit__(None, None, None)
    assert os.listdir(tmp_path) == ["experts-00000.safetensors"]
    assert layer_file(tmp_path, 0).read_bytes() == before


def test_a_mapped_layer_outlives_its_file(tmp_path):
    saved = experts_of({"format": "int4"})
    saved.save(tmp_path)
    opened = Experts.open(tmp_path, mmap=True)
    experts_of({"format": "bf16"}).save(tmp_path)
    assert same(saved, opened)
    layer_file(tmp_path, 0).unlink()
    assert same(saved, opened)


def test_rewritten_by_another_library(tmp_path):
    saved = experts_of({"format": "int8"})
    saved.save(tmp_path)
    path = layer_file(tmp_path, 0)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata)
    assert same(saved, open_packed(tmp_path))


def test_cannot_save(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot write .*file"):
        experts_of({"format": "int8"}).save(tmp_path / "file" / "folder")


def test_what_is_packed(tmp_path):
    assert not packed(tmp_path) and not packed(tmp_path / "missing")
    experts_of({"format": "int8"}).save(tmp_path, layer=12)
    experts_of({"format": "int8"}).save(tmp_path, layer=3)
    assert packed(tmp_path) and packed(layer_file(tmp_path, 3))
    assert packed_layers(tmp_path) == [3, 12]
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert not packed(tmp_path / "other.safetensors")


def refuse(path, message, **options):
    with pytest.raises(CheckpointError, match=message):
        open_packed(path, **options)


def test_wrong_layer_and_unfinished_folder(tmp_path):
    experts_of({"format": "int8"}).save(tmp_path, layer=3)
    refuse(tmp_path, "no layer 0 in .*; packed layers found: 3")
    refuse(tmp_path / "missing", "no packed layers found")
    refuse(layer_file(tmp_path, 3), "holds layer 3, asked for layer 0")
    (tmp_path / UNFINISHED).touch()
    refuse(tmp_path, "is an unfinished conversion", layer=3)


def rewritten(folder, change):
    """A packed layer whose tensors and metadata were changed by `change`, in a file that is otherwise sound."""
    experts_of({"format": "int4"}).save(folder)
    path = layer_file(folder, 0)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return folder


def with_activation(**change):
    return json.dumps({"kind": "silu", "alpha": 1.0, "limit": 0.0, "up_offset": 0.0} | change)


METADATA = {
    "newer major version": ("version", "3.0", "packed format version '3.0', this coterie reads 2.x"),
    "older major version": ("version", "1.0", "packed format version '1.0', this coterie reads 2.x"),
    "no version number": ("version", "one", "version 'one'"),
    "unknown format": ("experts", "int3", "experts is 'int3', expected one of bf16"),
    "another format": ("experts", "int8", "expected U8"),
    "group size": ("group_size", "48", "group_size of int4: expected"),
    "a group size that does not divide": ("group_size", "128", "not a multiple of group_size=128"),
    "zero_point nonsense": ("zero_point", "yes", "zero_point is 'yes', expected true or false"),
    "gate that is missing": ("has_gate", "false", "expected U8"),
    "fewer experts": ("num_experts", "2", "3 tensors, expected one for each of 2 experts"),
    "very many experts": ("num_experts", "999999999", "3 tensors, expected one for each of 999999999 experts"),
    "no experts": ("num_experts", "0", "num_experts is '0', expected a whole number from 1"),
    "negative": ("hidden_size", "-4", "hidden_size is '-4'"),
    "other digits": ("hidden_size", "١٩٢", "hidden_size is"),
    "endless": ("hidden_size", "9" * 5000, "hidden_size is '9999"),
    "another size": ("hidden_size", "256", "expected U8"),
    "another layer": ("layer", "1", r"has no tensor 'blk.1.ffn_exps.0'"),
    "activation no JSON": ("activation", "silu", "an activation as JSON"),
    "activation a list": ("activation", "[]", "an object of kind, alpha"),
    "activation unknown": ("activation", with_activation(kind="mish"), "unknown activation"),
    "activation kind a list": ("activation", with_activation(kind=["silu"]), "activation"),
    "activation infinite": ("activation", with_activation(alpha=float("inf")), "finite numbers"),
    "activation text": ("activation", with_activation(alpha=[]), "an activation as JSON"),
    "activation nested": ("activation", "[" * 100_000, "an activation as JSON"),
}


@pytest.mark.parametrize("key, value, message", METADATA.values(), ids=METADATA)
def test_metadata_that_lies(tmp_path, key, value, message):
    folder = rewritten(tmp_path, lambda tensors, metadata: metadata.update({f"coterie.{key}": value}))
    refuse(folder, message)
    refuse(folder, message, mmap=True)


@pytest.mark.parametrize("key", ["version", "experts", "num_experts", "activation", "layer"])
def test_metadata_that_is_missing(tmp_path, key):
    folder = rewritten(tmp_path, lambda tensors, metadata: metadata.pop(f"coterie.{key}"))
    refuse(folder, f"is not a packed layer: its metadata has no coterie.{key}")


LIES = {"coterie.experts": "mixed"}


def of_mixed(gate_up=("int4", 64, True), down=("bf16", 0, False), **more):
    parts = {"gate_up": gate_up, "down": down} | more
    keys = ("format", "group_size", "zero_point")
    return json.dumps({part: dict(zip(keys, spec, strict=True)) for part, spec in parts.items()})


def test_metadata_of_two_formats(tmp_path):
    formats = Formats(resolve("int4", 64, True), resolve("bf16"))
    Experts.pack(**random_experts(1, sizes=SIZES), format=formats).save(tmp_path)
    metadata = TensorFile(layer_file(tmp_path, 0)).metadata
    assert metadata["coterie.experts"] == "mixed" and metadata["coterie.formats"] == of_mixed()
    assert not {"coterie.group_size", "coterie.zero_point"} & metadata.keys()
    assert Experts.open(tmp_path).formats == formats


MIXED = {
    "no JSON": ("{", "coterie.formats is '{', expected JSON"),
    "nested": ("[" * 100_000, "expected JSON"),
    "a list": ("[]", r"coterie.formats: expected an object of gate_up and down, found \[\]"),
    "a part too many": (of_mixed(gate=("int4", 64, True)), "expected an object of gate_up and down"),
    "a format that is text": ('{"gate_up": "int4", "down": "int4"}', "a format as an object of format, .*found 'int4'"),
    "a number of another kind": (of_mixed(("int4", True, True)), "expected a format as an object of"),
    "an unknown format": (of_mixed(("int3", 64, True)), "expected one of bf16, .*, found 'int3'"),
    "a format of another kind": (of_mixed(([], 64, True)), "expected a format as an object of"),
    "a group size that it has not": (of_mixed(("int4", 48, True)), "group_size of int4: expected .*, found 48"),
    "a group size that does not divide": (of_mixed(down=("int4", 128, False)), "down: 64 columns are not a multiple"),
    "another format": (of_mixed(("int8", 64, False)), "expected U8"),
}


@pytest.mark.parametrize("formats, message", MIXED.values(), ids=MIXED)
def test_metadata_of_two_formats_that_lies(tmp_path, formats, message):
    refuse(rewritten(tmp_path, lambda _, metadata: metadata.update(LIES | {"coterie.formats": formats})), message)


def test_metadata_of_two_formats_that_is_missing(tmp_path):
    folder = rewritten(tmp_path, lambda _, metadata: metadata.update(LIES))
    refuse(folder, "is not a packed layer: its metadata has no coterie.formats")


NAME = "blk.0.ffn_exps.1"
TENSORS = {
    "missing": (lambda t: t.pop(NAME), "2 tensors, expected one for each of 3 experts"),
    "one too many": (lambda t: t.update(x=torch.zeros(4)), "4 tensors, expected one for each of 3 experts"),
    "renamed": (lambda t: t.update({"x": t.pop(NAME)}), f"has no tensor '{NAME}'"),
    "short": (
        lambda t: t.update({NAME: t[NAME][:-1]}),
        r"expected U8 \[24576\], found U8 \[24575\]",
    ),
    "another dtype": (
        lambda t: t.update({NAME: t[NAME].view(torch.int8)}),
        "expected U8 .* found I8",
    ),
    "bias of another shape": (
        lambda t: t.update({"blk.0.ffn_up_exps.bias": torch.zeros(3)}),
        r"expected F32 \[3, 64\]",
    ),
}


@pytest.mark.parametrize("change, message", TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit(tmp_path, change, message):
    refuse(rewritten(tmp_path, lambda tensors, metadata: change(tensors)), message)


def test_unaligned_files_are_not_mapped(tmp_path):
    experts = experts_of({"format": "int8"})
    experts.save(tmp_path)
    path = layer_file(tmp_path, 0)
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little") + 8
    path.write_bytes(length.to_bytes(8, "little") + raw[8:length] + b" " * 8 + raw[length:])
    refuse(tmp_path, "not 4096-byte aligned", mmap=True)
    assert same(experts, open_packed(tmp_path))


def test_newer_minor_versions_are_read(tmp_path):
    folder = rewritten(
        tmp_path, lambda tensors, metadata: metadata.update({"coterie.version": "2.7", "coterie.new": "x"})
    )
    assert open_packed(folder).format == "int4"


def test_truncated(tmp_path):
    experts_of({"format": "int8"}).save(tmp_path)
    path = layer_file(tmp_path, 0)
    path.write_bytes(path.read_bytes()[:-1])
    refuse(tmp_path, "experts-00000.safetensors is truncated in tensor 'blk.0.ffn_exps.2'")
