"""Whatever bytes a packed file is made of, opening it works or raises CheckpointError: no crash, no other error."""

import functools
import json
import tempfile

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_checkpoints import random_experts

from coterie import Experts
from coterie.checkpoints import open_layer
from coterie.checkpoints.packed import layer_file
from coterie.errors import CheckpointError
from coterie.formats import FORMATS, Formats, resolve

MIXED = Formats(resolve("int4"), resolve("int8"))
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@functools.cache
def sound(format="int4"):
    """The bytes of a sound packed file."""
    experts = Experts.pack(**random_experts(0, sizes=(2, 64, 64)), format=format, up_bias=torch.randn(2, 64))
    with tempfile.TemporaryDirectory() as folder:
        experts.save(folder)
        return layer_file(folder, 0).read_bytes()


def open_both_ways(path, content):
    path.write_bytes(content)
    for mmap in (False, True):
        try:
            experts = Experts.from_packed(open_layer(path), mmap)
        except CheckpointError as error:
            str(error).encode("ascii", "strict")
        else:
            x, ids = torch.zeros(1, experts.hidden_size), torch.zeros(1, 1, dtype=torch.int64)
            assert experts(x, ids, torch.ones(1, 1)).shape == x.shape


def header_of(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header, data):
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text + data


@FUZZ
@given(content=st.binary(max_size=300))
def test_random_bytes(tmp_path, content):
    open_both_ways(tmp_path / "x.safetensors", content)


@FUZZ
@given(text=st.binary(max_size=200), data=st.binary(max_size=100))
def test_random_headers(tmp_path, text, data):
    open_both_ways(tmp_path / "x.safetensors", len(text).to_bytes(8, "little") + text + data)


@FUZZ
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncations(tmp_path, share):
    open_both_ways(tmp_path / "x.safetensors", sound()[: int(share * len(sound()))])


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8))
def test_flipped_bytes(tmp_path, flips):
    content = bytearray(sound())
    for position, value in flips:
        content[position] = value
    open_both_ways(tmp_path / "x.safetensors", bytes(content))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=10)
    | st.sampled_from(["U8", "F32", "2.0"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=6,
)


@FUZZ
@given(data=st.data())
def test_mutated_headers(tmp_path, data):
    header, tail = header_of(sound())
    for _ in range(data.draw(st.integers(1, 3))):
        where = data.draw(st.sampled_from([header, header["__metadata__"], *header.values()]))
        if isinstance(where, dict) and where and isinstance(header.get("__metadata__"), dict):
            key = data.draw(st.sampled_from(sorted(where)))
            if data.draw(st.booleans()):
                where[key] = data.draw(JSON)
            else:
                where[data.draw(st.text(max_size=10))] = where.pop(key)
        if not isinstance(header.get("__metadata__"), dict):
            break
    open_both_ways(tmp_path / "x.safetensors", with_header(header, tail))


@FUZZ
@given(data=st.data())
def test_mutated_metadata(tmp_path, data):
    header, tail = header_of(sound(data.draw(st.sampled_from(["int4", MIXED]))))
    metadata = header["__metadata__"]
    key = data.draw(st.sampled_from(sorted(metadata)))
    words = ["0", "1", "2", "63", "64", "65", "128", "true", "false", "bf16", "int8", "int4", "mixed", "1.1", "{}"]
    words += [metadata["coterie.formats"].replace("int8", name) for name in FORMATS if "coterie.formats" in metadata]
    metadata[key] = data.draw(st.sampled_from(words) | st.text(max_size=12) | JSON.map(json.dumps))
    open_both_ways(tmp_path / "x.safetensors", with_header(header, tail))


@FUZZ
@given(data=st.data())
def test_mutated_offsets_and_sizes(tmp_path, data):
    header, tail = header_of(sound())
    names = sorted(name for name in header if name != "__metadata__")
    a, b = (data.draw(st.sampled_from(names)) for _ in range(2))
    change = data.draw(st.integers(-64, 64))
    what = data.draw(st.sampled_from(["swap", "offsets", "shape", "grow"]))
    if what == "swap":
        header[a], header[b] = header[b], header[a]
    elif what == "offsets":
        header[a]["data_offsets"][data.draw(st.integers(0, 1))] += change
    elif what == "shape":
        header[a]["shape"] = data.draw(st.lists(st.integers(-3, 2**63), max_size=4))
    else:
        header[a]["shape"][0] += change
        header[a]["data_offsets"][1] += change
    open_both_ways(tmp_path / "x.safetensors", with_header(header, tail))
