"""Loose layers put together are the checkpoint that one conversion writes."""

import json
import shutil

import pytest
import torch
from made_checkpoints import two_layers, write_checkpoint
from quantised_checkpoints import gpt_oss
from safetensors import safe_open

from coterie import Experts
from coterie.checkpoints.packed import UNFINISHED
from coterie.convert import convert_cpu
from coterie.convert.merge import merge
from coterie.errors import ArgumentError, CheckpointError


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tmp_path):
    folder, _ = two_layers(tmp_path / "in", shards=2)
    (folder / "additional").mkdir()
    (folder / "additional" / "template.jinja").write_text("x")
    return folder


@pytest.mark.parametrize("way", ["folders of layers", "files", "several folders"])
def test_it_is_what_one_conversion_writes(tmp_path, source, way):
    convert_cpu(source, tmp_path / "whole", "int8")
    inputs = [tmp_path / "loose"]
    if way == "several folders":
        inputs = [tmp_path / "a", tmp_path / "b"]
        for layer, folder in enumerate(inputs):
            convert_cpu(source, folder, "int8", layers=[layer], loose=layer == 1)
    elif way == "files":
        convert_cpu(source, inputs[0], "int8", layers=[0, 1])
    else:
        convert_cpu(source, inputs[0], "int8", loose=True)
    done = merge(inputs, tmp_path / "out", source)
    assert done.whole and done.layers == (0, 1) and done.formats.name == "int8"
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert done.bytes == sum(map(len, files(tmp_path / "out").values()))


def test_tensors_of_a_shard(tmp_path, source):
    convert_cpu(source, tmp_path / "loose", loose=True)
    merge([tmp_path / "loose"], tmp_path / "out", source, max_tensors=4)
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    counts = [len(safe_open(shard, "pt").keys()) for shard in shards]
    assert counts == [4, 2] and shards[0].name == "model-00001-of-00002.safetensors"


def test_experts_alone(tmp_path, source):
    convert_cpu(source, tmp_path / "loose", loose=True)
    done = merge([tmp_path / "loose"], tmp_path / "out")
    assert not done.whole and not (tmp_path / "out" / "config.json").exists()
    for layer in range(2):
        loose = tmp_path / "loose" / f"_layer_{layer}" / "_numa_0" / f"experts-0000{layer}.safetensors"
        expected, found = Experts.open(loose, layer), Experts.open(tmp_path / "out", layer)
        assert all(torch.equal(expected.packed(e), found.packed(e)) for e in range(3))


def test_biases_and_activation(tmp_path):
    tensors, config, _ = gpt_oss(layers=2)
    source = write_checkpoint(tmp_path / "in", tensors | {"model.norm.weight": torch.ones(4)}, config)
    convert_cpu(source, tmp_path / "whole")
    convert_cpu(source, tmp_path / "loose", loose=True)
    merge([tmp_path / "loose"], tmp_path / "out", source)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_layers_of_several_formats(tmp_path, source):
    convert_cpu(source, tmp_path / "a", "int8", layers=[0])
    convert_cpu(source, tmp_path / "b", "int4", layers=[1])
    done = merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", source)
    assert done.formats.described == "int8 (layer 0); int4 in groups of 32 (layer 1)"
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert stored["experts"] == "mixed" and list(stored["formats"]) == ["0", "1"]
    assert [Experts.open(tmp_path / "out", layer).format for layer in range(2)] == ["int8", "int4"]


def test_what_cannot_be_put_together(tmp_path, source):
    def loose(name, method="int8", layers=(0, 1), of=source):
        convert_cpu(of, tmp_path / name, method, layers=list(layers), loose=True)
        return tmp_path / name

    a, first = loose("a"), loose("first", layers=[0])
    shutil.copytree(a, tmp_path / "renamed")
    wrong = tmp_path / "renamed" / "_layer_0" / "_numa_0" / "experts-00000.safetensors"
    wrong.rename(wrong.with_name("experts-00007.safetensors"))
    twice = shutil.copytree(a, tmp_path / "twice")
    shutil.copy(twice / "_layer_0" / "_numa_0" / "experts-00000.safetensors", twice)
    unfinished = shutil.copytree(a, tmp_path / "unfinished")
    (unfinished / UNFINISHED).write_text("{}")
    broken = shutil.copytree(a, tmp_path / "broken")
    file = broken / "_layer_1" / "_numa_0" / "experts-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    larger = write_checkpoint(tmp_path / "larger", *gpt_oss(layers=2)[:2])
    convert_cpu(source, tmp_path / "packed")
    for inputs, original, message, error in (
        ([tmp_path / "nowhere"], None, "nowhere is no folder", CheckpointError),
        ([source], None, "no packed layers found; the names tried: experts-NNNNN", CheckpointError),
        ([unfinished], None, "unfinished is an unfinished conversion", CheckpointError),
        ([broken], None, "truncated in tensor", CheckpointError),
        ([a, first], None, "layer 0 is in both .*first", ArgumentError),
        ([twice], None, "layer 0 is in both", CheckpointError),
        ([tmp_path / "renamed"], None, "holds layer 0, its name says 7", CheckpointError),
        ([first], source, "layers 1 of .* are not there, only 0: convert", ArgumentError),
        ([a], larger, "was not packed from .*larger: hidden_size is 64, expected 256", ArgumentError),
        ([a], tmp_path / "first", "holds no checkpoint", CheckpointError),
        ([a], tmp_path / "packed", "is packed already: use the original checkpoint", ArgumentError),
    ):
        with pytest.raises(error, match=message):
            merge(inputs, tmp_path / "out", original)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ArgumentError, match="--max-tensors is of the rest"):
        merge([a], tmp_path / "out", max_tensors=3)
    with pytest.raises(ArgumentError, match="is not empty"):
        merge([a], source, source)
