"""GGUF headers as they are read here, beside the gguf package's reader, which takes seconds for a vocabulary."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest
from gguf_models import blocks

from coterie.checkpoints.gguf_file import GgufFile
from coterie.errors import CheckpointError

VALUES = {
    "uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 1 << 31, "int32": -(1 << 30), "float32": 0.1,
    "uint64": 1 << 60, "int64": -(1 << 60), "float64": 0.1, "bool": True, "string": "größe",
}  # fmt: skip
ARRAYS = {"numbers": [3, -1, 2], "floats": [0.5, 0.1], "flags": [True, False], "words": ["a", "", "größe"]}


def written(path, tensors=None):
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for kind, value in VALUES.items():
        getattr(writer, f"add_{kind}")(f"one.{kind}", value)
    for key, value in ARRAYS.items():
        writer.add_array(f"some.{key}", value)
    for name, (made, kind) in (tensors or {}).items():
        writer.add_tensor(name, made, raw_dtype=None if kind in ("F32", "F16") else gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_the_gguf_package_reads(tmp_path):
    shapes = {"F32": (3, 5), "F16": (2, 3, 4), "BF16": (3, 7), "Q8_0": (2, 3, 64), "Q4_K": (5, 256), "MXFP4": (4, 32)}
    path = written(tmp_path / "model.gguf", {kind: (blocks(kind, shape), kind) for kind, shape in shapes.items()})
    file, expected = GgufFile(path), gguf.GGUFReader(path)
    keys = [key for key in expected.fields if not key.startswith("GGUF.")]
    assert [file.value(key) for key in keys] == [expected.fields[key].contents() for key in keys]
    assert [file.value(key) for key in keys if key.startswith("some.")][2:] == list(ARRAYS.values())[2:]
    assert file.value("one.none", 7) == 7 and file.count("some.words") == 3 and file.count("some.none") is None
    assert file.names == [tensor.name for tensor in expected.tensors] == list(shapes)
    for tensor in expected.tensors:
        name = tensor.name
        assert (file.type(name), file.shape(name), file.nbytes(name)) == (name, shapes[name], tensor.n_bytes)
        found = file.data(name)
        assert found.dtype == tensor.data.dtype and np.array_equal(found, tensor.data)
        assert np.array_equal(file.data(name, 1), tensor.data[1])
        dense = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(file.dequantize(name, slice(1, 2)), dense[1:2])


def test_metadata_alone(tmp_path):
    """Which the package reads too: of long arrays there is their length."""
    made = tmp_path / "metadata.gguf"
    made.write_bytes(GgufFile(written(tmp_path / "model.gguf", {"a": (blocks("F32", (2, 2)), "F32")})).metadata(2, n=5))
    found = gguf.GGUFReader(made)
    values = {key: field.contents() for key, field in found.fields.items() if not key.startswith("GGUF.")}
    assert (values["some.numbers"], values["some.words"], values["n"]) == (3, 3, 5) and not found.tensors
    assert values["some.flags"] == [True, False] and values["one.string"] == "größe"


def spoiled(path, change):
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.__setitem__(slice(4, 8), struct.pack("<I", 1)), "version 1, expected one of 2, 3"),
        (lambda data: data.__setitem__(slice(4, 8), struct.pack(">I", 3)), "other byte order"),
        (lambda data: data.__setitem__(slice(data.index(b"one.int16"), data.index(b"one.int16") + 9), b"one.int32"),
         "two entries are named 'one.int32'"),
        (lambda data: data.__delitem__(slice(-1, None)), "tensor a ends at byte"),
    ],
    ids=["version", "order", "twice", "cut"],
)  # fmt: skip
def test_headers_that_are_not_read(tmp_path, change, message):
    path = spoiled(written(tmp_path / "model.gguf", {"a": (blocks("F32", (8, 8)), "F32")}), change)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(path)


def test_blocks_that_rows_are_not_made_of(tmp_path):
    path = written(tmp_path / "model.gguf", {"a": (blocks("Q8_0", (4, 64)), "Q8_0")})
    at = path.read_bytes().index(struct.pack("<QQ", 64, 4))
    spoiled(path, lambda data: data.__setitem__(slice(at, at + 8), struct.pack("<Q", 48)))
    with pytest.raises(CheckpointError, match=r"tensor a: shape \[4, 48\], Q8_0 has blocks of 32"):
        GgufFile(path)


def test_alignment(tmp_path):
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_custom_alignment(256)
    for name in "ab":
        writer.add_tensor(name, blocks("F32", (3, 5), seed=ord(name)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    for tensor in gguf.GGUFReader(path).tensors:
        assert tensor.data_offset % 256 == 0 and np.array_equal(file.data(tensor.name), tensor.data)
    spoiled(path, lambda data: data.__setitem__(data.index(b"general.alignment") + 21, 3))
    with pytest.raises(CheckpointError, match=r"general\.alignment is 259, expected a power of two"):
        GgufFile(path)
