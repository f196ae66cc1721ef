"""Finding expert tensors among all names of a checkpoint."""

import pytest

from coterie.checkpoints.naming import find_layers, names_tried
from coterie.errors import CheckpointError, MissingTensorError


def test_other_experts_are_not_the_layers():
    names = [
        "model.layers.0.mlp.experts.0.gate_proj.weight",
        "model.layers.0.mlp.shared_experts.gate_proj.weight",
        "model.layers.0.mlp.shared_expert.up_proj.weight",
        "model.layers.0.shared_mlp.input_linear.weight",
        "model.layers.0.mlp.experts.e_score_correction_bias",
        "model.layers.1.mlp.gate_proj.weight",
        "model.layers.3.mlp.experts.0.gate_proj.weight",
        "mtp.layers.0.mlp.experts.0.gate_proj.weight",
    ]
    assert list(find_layers(names, num_layers=3)) == [0]
    assert list(find_layers(names)) == [0, 3]


def test_two_modules_of_one_layer():
    names = [f"{part}.layers.0.mlp.experts.0.up_proj.weight" for part in ("thinker.model", "talker.model")]
    with pytest.raises(CheckpointError, match=r"layer 0 has experts under 'thinker.* and under 'talker"):
        find_layers(names)


def test_none_lists_every_name():
    with pytest.raises(MissingTensorError) as raised:
        find_layers(["model.embed_tokens.weight"])
    for name in names_tried():
        assert name in str(raised.value)
    assert "experts.{e}.gate_proj.weight" in str(raised.value)


def test_what_kt_kernel_converted_is_refused_with_the_way_out():
    names = ["model.embed_tokens.weight", "blk.0.ffn_up_exps.3.numa.0.weight", "blk.0.ffn_up_exps.3.numa.0.scale"]
    with pytest.raises(CheckpointError, match=r"kt-kernel converted .*'blk.0.ffn_up_exps.3.numa.0.weight'.*original"):
        find_layers(names)
