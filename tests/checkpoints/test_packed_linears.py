"""Files of packed linear layers: what they hold, byte by byte, and what is not taken for one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import coterie
from coterie.checkpoints import packed_linears
from coterie.checkpoints.packed_linears import open_linears, read_linears, write_linears
from coterie.checkpoints.tensorfile import TensorFile
from coterie.errors import ArgumentError, CheckpointError
from coterie.formats import resolve

SHAPES = {"a.weight": (48, 64), "b.weight": (160, 128), "c.weight": (1, 32)}


def made(folder, format="int8"):
    """A file of SHAPES, and the layers in it."""
    torch.manual_seed(0)
    linears = {name: coterie.Linear.pack(torch.randn(shape), format=format) for name, shape in SHAPES.items()}
    specs = dict.fromkeys(SHAPES, resolve(format))
    weight_map = write_linears(lambda name: folder / name, specs, SHAPES, lambda name: linears[name].packed)
    return linears, weight_map


def test_one_byte_at_a_time(tmp_path):
    """As docs/format.md says: one weight, from the file alone."""
    linears, weight_map = made(tmp_path)
    assert set(weight_map.values()) == {"linears-00000.safetensors"}
    with safe_open(tmp_path / "linears-00000.safetensors", "np") as file:
        meta, data = file.metadata(), file.get_tensor("b.weight")
    assert meta["coterie.linears"] == "int8" and meta["coterie.group_size"] == "0"
    rows, cols = json.loads(meta["coterie.shapes"])["b.weight"]
    assert (rows, cols) == (160, 128) and len(data) % 4096 == 0
    n, k = 131, 77  # in the third block, which has two panels
    block = 2 * (cols // 64 * 16 * 64 * 4 + 64 * 4)
    line = block + k // 64 * 16 * 64 * 2 + (k % 64 // 4 * 2 + n % 64 // 16) * 64
    position = line + 4 * (n % 16) + (0, 2, 1, 3)[k % 4]
    scale = data[block + cols // 64 * 16 * 64 * 2 :][: 4 * 32].view(np.float32)[n % 64]
    assert (int(data[position]) - 128) * scale == linears["b.weight"].dequantize()[n, k].item()


def test_every_layer_begins_on_a_page(tmp_path):
    made(tmp_path)
    file = TensorFile(tmp_path / "linears-00000.safetensors")
    assert list(file.entries) == list(SHAPES)
    assert all((file.data_start + entry.start) % 4096 == 0 for entry in file.entries.values())


@pytest.mark.parametrize("mmap", [False, True])
def test_opened(tmp_path, mmap):
    linears, _ = made(tmp_path, "int4")
    bias, x = torch.randn(160), torch.randn(3, 128)
    file = open_linears([tmp_path / "linears-00000.safetensors"])["b.weight"]
    linear = coterie.Linear.from_packed(file, "b.weight", bias, mmap=mmap)
    assert torch.equal(linear.packed, linears["b.weight"].packed) and linear.nbytes == linears["b.weight"].nbytes
    torch.testing.assert_close(linear(x), linears["b.weight"](x) + bias)


def test_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr(packed_linears, "FILE_BYTES", 28000)
    linears, weight_map = made(tmp_path)
    names = [f"linears-0000{number}.safetensors" for number in range(3)]
    assert list(weight_map.values()) == names
    found = open_linears(tmp_path / name for name in names)
    assert found.keys() == linears.keys()
    with pytest.raises(CheckpointError, match=r"tensor 'a\.weight' is in both"):
        open_linears([tmp_path / names[0], tmp_path / names[0]])


BROKEN = [
    ({"coterie.linears": None}, "is not a file of packed linear layers: its metadata has no coterie.linears"),
    ({"coterie.version": "3.0"}, "packed format version '3.0', this coterie reads 2.x"),
    ({"coterie.linears": "int3"}, "coterie.linears is 'int3', expected one of bf16"),
    ({"coterie.group_size": "7"}, "group_size of int8"),
    ({"coterie.group_size": "64"}, "'c.weight': 32 columns are not a multiple of group_size=64"),
    ({"coterie.zero_point": "true"}, "zero_point is an option of int4"),
    ({"coterie.shapes": "{"}, "coterie.shapes is '{', expected JSON"),
    ({"coterie.shapes": "[1]"}, "expected an object"),
    ({"coterie.shapes": '{"a.weight": [48, 64.0]}'}, r"expected \[rows, columns\]"),
    ({"coterie.shapes": '{"a.weight": 5}'}, r"expected \[rows, columns\]"),
    ({"coterie.shapes": '{"a.weight": [48, 64]}'}, "3 tensors, coterie.shapes names 1"),
    ({"coterie.shapes": json.dumps({**SHAPES, "a.weight": (48, 4096)})}, r"tensor 'a.weight': expected U8 \[200704\]"),
    ({"coterie.shapes": json.dumps(SHAPES).replace("a.w", "d.w")}, "has no tensor 'd.weight'"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_broken_metadata(tmp_path, changes, message):
    made(tmp_path)
    path = tmp_path / "linears-00000.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header["__metadata__"] | changes
    header["__metadata__"] = {key: value for key, value in metadata.items() if value is not None}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(CheckpointError, match=message):
        read_linears(TensorFile(path))


def test_a_file_that_is_not_aligned_is_not_mapped(tmp_path):
    linears, _ = made(tmp_path)
    path = tmp_path / "linears-00000.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    path.write_bytes((length + 8).to_bytes(8, "little") + raw[8 : 8 + length] + b" " * 8 + raw[8 + length :])
    file = open_linears([path])["a.weight"]
    with pytest.raises(CheckpointError, match=r"not 4096-byte aligned.*mmap=False"):
        coterie.Linear.from_packed(file, "a.weight", mmap=True)
    assert torch.equal(coterie.Linear.from_packed(file, "a.weight").packed, linears["a.weight"].packed)


def test_it_is_no_layer_of_experts(tmp_path):
    made(tmp_path)
    with pytest.raises(CheckpointError, match="is not a packed layer: its metadata has no"):
        coterie.Experts.open(tmp_path / "linears-00000.safetensors")


def test_a_write_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ArgumentError):
        write_linears(
            lambda name: tmp_path / name, dict.fromkeys(SHAPES, resolve("int8")), SHAPES,
            lambda name: coterie.Linear.pack(torch.full(SHAPES[name], torch.nan), format="int8").packed,
        )  # fmt: skip
    assert not list(tmp_path.iterdir())


# --- any bytes at all: opened, or a CheckpointError ---

FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUMBERS = st.integers() | st.floats() | st.none() | st.booleans() | st.sampled_from([1, 16, 48, 64, 65, 160])


def open_both_ways(path, content):
    path.write_bytes(content)
    try:
        for name, file in open_linears([path]).items():
            for mmap in (False, True):
                linear = coterie.Linear.from_packed(file, name, mmap=mmap)
                assert linear(torch.zeros(1, linear.in_features)).shape == (1, linear.out_features)
    except CheckpointError as error:
        str(error).encode("ascii", "strict")


def sound(folder) -> bytes:
    made(folder, "int4")
    return (folder / "linears-00000.safetensors").read_bytes()


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes(tmp_path, flips):
    content = bytearray(sound(tmp_path))
    for position, value in flips:
        content[position] = value
    open_both_ways(tmp_path / "x.safetensors", bytes(content))


@FUZZ
@given(shape=st.lists(NUMBERS, max_size=3) | NUMBERS, name=st.sampled_from(list(SHAPES)) | st.text(max_size=8))
def test_any_shapes(tmp_path, shape, name):
    raw = sound(tmp_path)
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"]["coterie.shapes"] = json.dumps({**SHAPES, name: shape})
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    open_both_ways(tmp_path / "x.safetensors", len(text).to_bytes(8, "little") + text + raw[8 + length :])
