"""Whatever bytes a GGUF file is made of, opening it, its config and its tokenizer works or raises an error of ours."""

from __future__ import annotations

import random
import struct
import time
from collections import Counter

import pytest
import torch
from gguf_families import write_family
from gguf_models import write_qwen
from gpt_oss_checkpoints import write_as_gguf, write_mxfp4
from tiny_models import make

from coterie.checkpoints import open_reader
from coterie.checkpoints.gguf_file import GgufFile
from coterie.errors import CheckpointError, CoterieError
from coterie.hf.gguf.config import open_tokenizer, read_config

ROPE = {"rope_type": "default", "rope_theta": 500000.0}
HOSTILE = [b"\xff" * 8, bytes(8), *((1 << bits).to_bytes(8, "little") for bits in (31, 40, 62))]


def qwen3(folder):
    return write_qwen(folder / "model.gguf", make("qwen3_moe", torch.float32, rope_parameters=ROPE), experts="Q4_0")


def gpt_oss(folder):
    return write_as_gguf(folder / "model.gguf", write_mxfp4(folder / "in"))


def deepseek(folder):
    return write_family(folder / "model.gguf", make("deepseek_v3", torch.float32))


def outcome(file, data):
    file.write_bytes(data)
    try:
        reader = open_reader(file)
        for number in reader.layers:
            layer = reader.layer(number)
            layer.expert(0), layer.biases()
        read_config(GgufFile(file))
        open_tokenizer(GgufFile(file))
    except CoterieError:
        return "refused"
    return "opened"


@pytest.mark.parametrize("write", [qwen3, gpt_oss])
def test_cut(tmp_path, write):
    file = write(tmp_path)
    data = file.read_bytes()
    for size in (0, 4, 20, 24, 100, 2000, len(data) // 2, len(data) - 10000, len(data) - 1):
        assert outcome(file, data[:size]) == "refused", size
    assert outcome(file, data) == "opened"


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("I", struct.pack("<IQ", 0, 1 << 62), "an array of 4611686018427387904 elements"),
        ("I", struct.pack("<IQ", 0, 1 << 23), "leads to byte 83"),
        ("I", struct.pack("<IQ", 9, 3), "an array of elements of type 9"),
        ("S", struct.pack("<Q", 1 << 62), "leads to byte 46116860184273"),
        ("X", b"", "a value of type 99"),
    ],
    ids=["endless", "too long", "nested", "string", "unknown"],
)
def test_hostile_lengths(tmp_path, kind, content, message):
    """Refused at once, whatever would be read."""
    file = tmp_path / "model.gguf"
    numbers = {"I": 9, "S": 8, "X": 99}
    value = struct.pack("<Q", 3) + b"key" + struct.pack("<I", numbers[kind]) + content
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value)
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=message):
        open_reader(file)
    assert time.perf_counter() - started < 5


def test_hostile_counts(tmp_path):
    file = tmp_path / "model.gguf"
    for tensors, values in ((1 << 62, 0), (0, 1 << 62)):
        file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, values))
        with pytest.raises(CheckpointError, match="leads to byte"):
            open_reader(file)
    tensor = struct.pack("<Q", 1) + b"t" + struct.pack("<I", 1 << 30)
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + tensor)
    with pytest.raises(CheckpointError, match="a tensor of 1073741824 dimensions"):
        open_reader(file)


def test_more_layers_than_tensors(tmp_path):
    file = write_as_gguf(tmp_path / "model.gguf", write_mxfp4(tmp_path / "in"), block_count=1 << 31)
    for read in (read_config, open_tokenizer):
        with pytest.raises(CheckpointError, match=r"2147483648 layers \(block_count\), and 41 tensors"):
            read(GgufFile(file))


@pytest.mark.parametrize("write", [qwen3, gpt_oss, deepseek])
def test_changed_bytes(tmp_path, write):
    file, draw, seen = write(tmp_path), random.Random(0), Counter()
    data = file.read_bytes()
    header = GgufFile(file)._header.end
    for _ in range(120):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 8])):
            at = draw.randrange(4, header - 8)
            new = draw.choice(HOSTILE) if draw.random() < 0.3 else bytes([draw.randrange(256)])
            changed[at : at + len(new)] = new
        seen[outcome(file, bytes(changed))] += 1
    assert seen["refused"] > 20 and seen["opened"] > 5
