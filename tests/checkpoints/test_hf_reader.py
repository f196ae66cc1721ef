"""Every naming and layout of plain checkpoints gives the same experts; a broken one, an error that says what it is."""

import json
import shutil

import pytest
import torch
from made_checkpoints import (
    CONFIG,
    MIXTRAL,
    QWEN,
    E,
    H,
    I,
    fused,
    random_experts,
    separate,
    two_layers,
    write_checkpoint,
)
from safetensors.torch import load_file, save_file

from coterie.checkpoints import open_reader
from coterie.errors import CheckpointError, MissingTensorError

EXPERTS = random_experts(0)
GPT_OSS = CONFIG | {"model_type": "gpt_oss"}
LAYOUTS = {
    "qwen": (separate("model.layers.0.mlp.experts", EXPERTS), CONFIG),
    "mixtral": (separate("model.layers.0.block_sparse_moe.experts", EXPERTS, MIXTRAL), CONFIG),
    "deepseek_v4": (separate("layers.0.ffn.experts", EXPERTS, MIXTRAL), CONFIG),
    "multimodal": (separate("model.language_model.layers.0.mlp.experts", EXPERTS), {"text_config": CONFIG}),
    "lfm2": (separate("model.layers.0.feed_forward.experts", EXPERTS, MIXTRAL), CONFIG),
    "fused": (fused("model.layers.0.mlp.experts", EXPERTS), CONFIG),
    "fused transposed": (fused("model.language_model.layers.0.mlp.experts", EXPERTS, transposed=True), CONFIG),
    "granite": (
        fused("model.layers.0.block_sparse_moe", EXPERTS, ("input_linear.weight", "output_linear.weight")),
        CONFIG,
    ),
    "aria": (fused("model.layers.0.mlp.experts", EXPERTS, ("fc1.weight", "fc2.weight"), transposed=True), CONFIG),
    "gpt_oss": (fused("model.layers.0.mlp.experts", EXPERTS, transposed=True, interleaved=True), GPT_OSS),
}


@pytest.mark.parametrize("tensors, config", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(tmp_path, tensors, config):
    noise = {
        "model.layers.0.mlp.shared_expert.gate_proj.weight": torch.zeros(2, 2),
        "lm_head.weight": torch.zeros(2, 2),
    }
    reader = open_reader(write_checkpoint(tmp_path, tensors | noise, config, shards=2))
    assert reader.layers == (0,)
    layer = reader.layer(0)
    assert (layer.num_experts, layer.hidden_size, layer.intermediate_size) == (E, H, I)
    assert layer.has_gate and layer.biased == ()
    assert set(layer.tensors) == set(tensors)
    assert layer.nbytes == 3 * E * H * I * 2
    for expert in range(E):
        weights = layer.expert(expert)
        assert list(weights) == ["gate", "up", "down"]
        layer.release(expert)
        for part, weight in weights.items():
            assert weight.stride(1) == 1
            assert torch.equal(weight, EXPERTS[part][expert]), part


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_dtypes(tmp_path, dtype):
    folder, layers = two_layers(tmp_path, dtype, shards=3)
    reader = open_reader(folder)
    assert reader.layers == (0, 1)
    for number, experts in enumerate(layers):
        weight = reader.layer(number).expert(2)["down"]
        assert weight.dtype == dtype and torch.equal(weight, experts["down"][2])


def test_plain_weights_are_views_of_the_file(tmp_path):
    folder, _ = two_layers(tmp_path)
    layer = open_reader(folder).layer(0)
    assert layer.expert(1)["up"].data_ptr() == layer.expert(1)["up"].data_ptr()


def test_a_single_file(tmp_path):
    save_file(LAYOUTS["qwen"][0], tmp_path / "experts.safetensors")
    assert open_reader(tmp_path / "experts.safetensors").layer(0).num_experts == E


def test_no_gate(tmp_path):
    without = {part: stack for part, stack in EXPERTS.items() if part != "gate"}
    config = CONFIG | {"model_type": "nemotron_h", "mlp_hidden_act": "relu2"}
    one_by_one = separate("backbone.layers.0.mixer.experts", without)
    stacked = {f"backbone.layers.0.mixer.experts.{QWEN[part]}": stack for part, stack in without.items()}
    for name, tensors in (("a", one_by_one), ("b", stacked)):
        layer = open_reader(write_checkpoint(tmp_path / name, tensors, config)).layer(0)
        assert not layer.has_gate and layer.activation.kind == "relu2"
        weights = layer.expert(1)
        assert list(weights) == ["up", "down"]
        assert all(torch.equal(weights[part], without[part][1]) for part in without)


def test_biases(tmp_path):
    biases = {"gate": torch.randn(E, I), "up": torch.randn(E, I), "down": torch.randn(E, H)}
    stem = "model.layers.0.mlp.experts"
    alternating = torch.stack([biases["gate"], biases["up"]], 2).flatten(1)
    gpt_oss = LAYOUTS["gpt_oss"][0] | {
        f"{stem}.gate_up_proj_bias": alternating,
        f"{stem}.down_proj_bias": biases["down"],
    }
    qwen = LAYOUTS["qwen"][0] | {
        f"{stem}.{e}.{QWEN[part]}.bias": bias[e].clone() for part, bias in biases.items() for e in range(E)
    }
    for name, tensors, config in (("a", gpt_oss, GPT_OSS), ("b", qwen, CONFIG)):
        layer = open_reader(write_checkpoint(tmp_path / name, tensors, config)).layer(0)
        assert layer.biased == ("gate", "up", "down")
        assert set(layer.tensors) == set(tensors)
        assert all(torch.equal(bias, biases[part]) for part, bias in layer.biases().items())


def refuse(folder, message, error=CheckpointError):
    with pytest.raises(error, match=message) as raised:
        open_reader(folder).layer(0)
    assert str(folder) in str(raised.value)
    return str(raised.value)


def changed(folder, change):
    """The checkpoint of two layers, its tensors changed by `change`."""
    two_layers(folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


FIRST = "model.layers.0.mlp.experts"


def test_missing_tensor_lists_every_name(tmp_path):
    folder = changed(tmp_path, lambda t: t.pop(f"{FIRST}.1.up_proj.weight"))
    message = refuse(folder, f"no tensor {FIRST}.1.up_proj.weight; the names tried", MissingTensorError)
    for name in (f"{FIRST}.1.w3.weight", f"{FIRST}.gate_up_proj", f"{FIRST}.1.up_proj.weight"):
        assert name in message
    with pytest.raises(KeyError):
        open_reader(folder).layer(0)


def test_missing_expert(tmp_path):
    folder = changed(tmp_path, lambda t: [t.pop(f"{FIRST}.1.{leaf}.weight") for leaf in QWEN.values()])
    refuse(folder, f"no tensor {FIRST}.1.down_proj.weight", MissingTensorError)


def test_all_gates_missing(tmp_path):
    folder = changed(tmp_path, lambda t: [t.pop(f"{FIRST}.{e}.gate_proj.weight") for e in range(E)])
    refuse(folder, "gate_proj.weight; the names tried", MissingTensorError)


def test_count_differs_from_config(tmp_path):
    folder = changed(tmp_path, lambda t: [t.pop(f"{FIRST}.2.{leaf}.weight") for leaf in QWEN.values()])
    refuse(folder, "2 experts, config.json says 3")


def test_wrong_shape(tmp_path):
    folder = changed(tmp_path, lambda t: t.update({f"{FIRST}.1.down_proj.weight": torch.zeros(H, I + 1)}))
    refuse(folder, rf"model.safetensors, tensor '{FIRST}.1.down_proj.weight': shape \[64, 33\], expected \[64, 32\]")


def test_wrong_dtype(tmp_path):
    folder = changed(tmp_path, lambda t: t.update({f"{FIRST}.1.up_proj.weight": torch.zeros(I, H, dtype=torch.int8)}))
    refuse(folder, "up_proj.weight': dtype I8, expected one of BF16, F16, F32")


def test_wrong_dimensions(tmp_path):
    folder = changed(tmp_path, lambda t: t.update({f"{FIRST}.0.up_proj.weight": torch.zeros(I * H)}))
    refuse(folder, r"shape \[2048\], expected 2 dimensions")


def test_two_ways_at_once(tmp_path):
    folder = changed(tmp_path, lambda t: t.update({f"{FIRST}.0.w1.weight": torch.zeros(I, H)}))
    refuse(folder, "named in two ways at once")


def test_half_of_a_stack(tmp_path):
    tensors = LAYOUTS["fused"][0]
    write_checkpoint(tmp_path, {name: t for name, t in tensors.items() if "down" not in name})
    refuse(tmp_path, "found only experts.gate_up_proj of a layer's experts; the names tried", MissingTensorError)


def test_stacks_that_do_not_fit(tmp_path):
    write_checkpoint(
        tmp_path, {f"{FIRST}.gate_up_proj": torch.zeros(E, 5, 7), f"{FIRST}.down_proj": torch.zeros(E, 4, 6)}
    )
    refuse(tmp_path, r"gate_up_proj \[3, 5, 7\] and .*down_proj \[3, 4, 6\]: expected \[E, 2I, H\]")
    write_checkpoint(
        tmp_path, {f"{FIRST}.gate_up_proj": torch.zeros(E, 8, 6), f"{FIRST}.down_proj": torch.zeros(2, 6, 4)}
    )
    refuse(tmp_path, r"down_proj': shape \[2, 6, 4\], expected \[3, 6, 4\]")


def test_no_such_layer(tmp_path):
    folder, _ = two_layers(tmp_path)
    with pytest.raises(CheckpointError, match="no experts in layer 7; layers with experts: 0-1"):
        open_reader(folder).layer(7)


def test_no_experts(tmp_path):
    write_checkpoint(tmp_path, {"model.layers.0.mlp.gate_proj.weight": torch.zeros(2, 2)})
    refuse(tmp_path, "no experts found; the names tried", MissingTensorError)


def test_folders_that_are_none(tmp_path):
    refuse(tmp_path / "missing", "does not exist")
    refuse(tmp_path, r"holds no checkpoint: no model.safetensors, no model.safetensors.index.json")
    (tmp_path / "pytorch_model.bin").touch()
    refuse(tmp_path, r"only 'pytorch_model.bin'; save it as safetensors first")


def test_shards(tmp_path):
    folder, _ = two_layers(tmp_path / "whole", shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())

    missing = shutil.copytree(folder, tmp_path / "missing")
    (missing / "model-00002-of-00003.safetensors").unlink()
    refuse(missing, "1 of the 3 shards named in .* are missing: 'model-00002-of-00003.safetensors'")

    truncated = shutil.copytree(folder, tmp_path / "truncated")
    shard = truncated / index["weight_map"][f"{FIRST}.0.up_proj.weight"]
    shard.write_bytes(shard.read_bytes()[:-5])
    refuse(truncated, f"{shard.name} is truncated in tensor")

    swapped = shutil.copytree(folder, tmp_path / "swapped")
    one, other = (swapped / f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
    one_bytes = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(one_bytes)
    refuse(swapped, "puts tensor .* which does not hold it", MissingTensorError)

    for name, text, message in (
        ("no map", "{}", "expected a weight_map"),
        ("outside", json.dumps({"weight_map": {"a": "../x.safetensors"}}), "lies outside the folder"),
        ("no JSON", "{", "not valid JSON"),
        ("a list", "[]", "JSON list, expected an object"),
    ):
        broken = shutil.copytree(folder, tmp_path / name)
        (broken / "model.safetensors.index.json").write_text(text)
        refuse(broken, message)


def test_shards_without_index(tmp_path):
    folder, layers = two_layers(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    assert torch.equal(open_reader(folder).layer(1).expert(0)["gate"], layers[1]["gate"][0])
    shutil.copy(folder / "model-00001-of-00002.safetensors", folder / "copy.safetensors")
    refuse(folder, "is in both copy.safetensors and model-00001-of-00002.safetensors")


def test_broken_config(tmp_path):
    folder, _ = two_layers(tmp_path)
    (folder / "config.json").write_text("{")
    refuse(folder, "config.json is not valid JSON")
