"""Experts.open on any checkpoint: packed ones as they are, plain ones packed on the way."""

import pytest
import torch
from made_checkpoints import CONFIG, E, I, fused, random_experts, two_layers, write_checkpoint

from coterie import Experts
from coterie.checkpoints import open_reader
from coterie.errors import ArgumentError, CheckpointError, MissingTensorError


def test_plain_is_packed_as_bf16(tmp_path):
    folder, layers = two_layers(tmp_path, shards=2)
    experts = Experts.open(folder, layer=1)
    assert experts.format == "bf16"
    for part, weights in zip(("gate", "up", "down"), experts.dequantize(), strict=True):
        assert torch.equal(weights, layers[1][part].float())


@pytest.mark.parametrize("options", [{"format": "int8"}, {"format": "int4", "group_size": 32, "zero_point": True}])
def test_plain_is_packed_as_asked(tmp_path, options):
    folder, layers = two_layers(tmp_path)
    opened, packed = Experts.from_reader(open_reader(folder).layer(0), **options), Experts.pack(**layers[0], **options)
    assert opened.spec == packed.spec
    assert all(torch.equal(opened.packed(e), packed.packed(e)) for e in range(packed.num_experts))


def test_biases_and_activation_come_along(tmp_path):
    stem = "model.layers.0.mlp.experts"
    tensors = fused(stem, random_experts(0), transposed=True, interleaved=True)
    tensors |= {f"{stem}.gate_up_proj_bias": torch.randn(E, 2 * I), f"{stem}.down_proj_bias": torch.randn(E, 64)}
    folder = write_checkpoint(tmp_path, tensors, CONFIG | {"model_type": "gpt_oss"})
    experts = Experts.open(folder)
    assert experts.activation.up_offset == 1.0
    assert torch.equal(experts.biases()["up"], tensors[f"{stem}.gate_up_proj_bias"][:, 1::2])


def test_packed_is_opened_as_it_is(tmp_path):
    saved = Experts.pack(**random_experts(0), format="int8")
    saved.save(tmp_path)
    for mmap in (False, True):
        assert Experts.open(tmp_path, mmap=mmap).format == "int8"


def test_plain_cannot_be_mapped(tmp_path):
    folder, _ = two_layers(tmp_path)
    with pytest.raises(ArgumentError, match="is not packed, so its experts cannot be mapped"):
        Experts.open(folder, mmap=True)


def test_nothing_to_open(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Experts.open(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Experts.open(tmp_path / "missing")
    write_checkpoint(tmp_path, {"a": torch.zeros(2)})
    with pytest.raises(MissingTensorError, match="no experts found"):
        Experts.open(tmp_path)
