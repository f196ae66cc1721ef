"""A conversion that is stopped anywhere never looks whole, and resumed gives what an uninterrupted one gives."""

import json
import os
import signal

import forks
import pytest
from made_checkpoints import E, two_layers

import coterie
from coterie import Experts
from coterie.checkpoints.folder import PACKED_INDEX
from coterie.checkpoints.folderwriter import lock
from coterie.checkpoints.packed import UNFINISHED
from coterie.convert import convert_cpu, finished_layers
from coterie.errors import ArgumentError, CheckpointError, CoterieError

# Kills itself before file number N takes its name, within the second layer, or as the mark is taken away.
SCRIPT = """
import os, signal, sys
from pathlib import Path
from coterie.convert import convert_cpu
source, output, last, loose = sys.argv[1:]
count, replace, unlink = 0, os.replace, Path.unlink
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def replaces(*names):
    global count
    count += 1
    if str(count) == last:
        kill()
    replace(*names)
def unlinks(path, *rest, **more):
    if last == "mark" and path.name == "coterie-unfinished.json":
        kill()
    unlink(path, *rest, **more)
os.replace, Path.unlink = replaces, unlinks
def within(layer, layers, expert, *_):
    if last == "within" and (layer, expert) == (2, 2):
        kill()
convert_cpu(source, output, loose=loose == "True", progress=within)
"""
# The mark, and for each of two layers its file and the mark; then a shard, tokenizer.json, config.json and the index.
STOPS = {
    "the mark": 1, "a layer": 2, "the mark of a layer": 3, "an expert": "within", "the second layer": 4,
    "a shard": 6, "config.json": 8,
    "the index": 9, "the end": "mark",
}  # fmt: skip


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "in"
    two_layers(folder)
    return folder


def killed(source, out, last, loose=False):
    assert forks.run(SCRIPT, source, out, last, loose).returncode == -signal.SIGKILL


@pytest.mark.parametrize("last", STOPS.values(), ids=STOPS)
def test_killed_and_resumed(tmp_path, source, last):
    out = tmp_path / "out"
    killed(source, out, last)
    for opening in (Experts.open, coterie.from_pretrained):
        with pytest.raises(CoterieError):
            opening(out)
    if last != 1:
        assert UNFINISHED in os.listdir(out)
        with pytest.raises(ArgumentError, match="holds an unfinished conversion"):
            convert_cpu(source, out)
    steps = []
    finished = tuple(finished_layers(out))
    assert len(finished) == {1: 0, 2: 0, 3: 0, 4: 1, "within": 1}.get(last, 2)
    report = convert_cpu(source, out, resume=True, progress=lambda *step: steps.append(step))
    assert report.resumed == finished and len(steps) == E * (2 - len(finished))
    whole = convert_cpu(source, tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")
    assert report.errors == whole.errors and report.packed_bytes == whole.packed_bytes


def test_loose_layers(tmp_path, source):
    whole = convert_cpu(source, tmp_path / "whole")
    report = convert_cpu(source, tmp_path / "loose", loose=True)
    expected = {f"_layer_{n}/_numa_0/experts-0000{n}.safetensors" for n in range(2)}
    assert files(tmp_path / "loose").keys() == expected
    assert report.errors == whole.errors and report.rest_bytes == 0
    for name, found in files(tmp_path / "loose").items():
        assert found == (tmp_path / "whole" / name.rpartition("/")[2]).read_bytes()
    killed(source, tmp_path / "killed", 4, loose=True)
    with pytest.raises(ArgumentError, match="conversion with layout loose files, this one has one checkpoint"):
        convert_cpu(source, tmp_path / "killed", resume=True)
    convert_cpu(source, tmp_path / "killed", loose=True, resume=True)
    assert files(tmp_path / "killed") == files(tmp_path / "loose")


def interrupted(source, out, **options):
    """A conversion that was stopped in its second layer."""

    def stop(layer, *_):
        if layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_cpu(source, out, progress=stop, **options)
    return out


def test_only_the_same_conversion_is_resumed(tmp_path, source):
    out = interrupted(source, tmp_path / "out", quant_method="int8")
    before = files(out)
    other, _ = two_layers(tmp_path / "other" / "in")
    for changed, message in (
        ({"quant_method": "int4"}, "with format int8, this one has int4 in groups of 32"),
        ({"quant_method": "int8", "source": other}, "with source .*, this one has .*other/in"),
        ({"quant_method": "int8", "layers": [0]}, "with layers 0-1, this one has 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            convert_cpu(**{"source": source, "output": out, "resume": True} | changed)
    assert files(out) == before


def test_resume_begins_where_nothing_is(tmp_path, source):
    convert_cpu(source, tmp_path / "out", resume=True)
    assert (tmp_path / "out" / PACKED_INDEX).exists()
    with pytest.raises(ArgumentError, match="is not empty"):
        convert_cpu(source, tmp_path / "out", resume=True)


def test_resume_at_a_layer(tmp_path, source):
    whole = convert_cpu(source, tmp_path / "whole", "int8")
    out = interrupted(source, tmp_path / "out", quant_method="int8")
    with pytest.raises(ArgumentError, match=r"--resume-layer is 2: layer 1 is not finished in .*; --resume finds"):
        convert_cpu(source, out, "int8", resume_layer=2)
    assert tuple(finished_layers(out)) == (0,)
    with (out / "experts-00000.safetensors").open("r+b") as file:  # which nothing would notice
        file.seek(-5000, os.SEEK_END)
        file.write(b"spoiled")
    report = convert_cpu(source, out, "int8", resume_layer=0)
    assert report.resumed == () and report.errors == whole.errors
    assert files(out) == files(tmp_path / "whole")


def test_a_layer_whose_file_is_not_whole_is_packed_again(tmp_path, source):
    convert_cpu(source, tmp_path / "whole")
    out = interrupted(source, tmp_path / "out")
    os.truncate(out / "experts-00000.safetensors", 5000)
    assert convert_cpu(source, out, resume=True).resumed == ()
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("finished", [[], {"x": {}}, {"0": {"errors": 3}}], ids=str)
def test_a_damaged_mark(tmp_path, source, finished):
    out = interrupted(source, tmp_path / "out")
    mark = out / UNFINISHED
    mark.write_text(json.dumps(json.loads(mark.read_text()) | {"finished": finished}))
    if not finished:
        convert_cpu(source, out, resume=True)
    else:
        with pytest.raises(CheckpointError, match="damaged"):
            convert_cpu(source, out, resume=True)


def test_a_folder_that_another_run_is_writing(tmp_path, source):
    out = interrupted(source, tmp_path / "out")
    before = files(out)
    held = lock(out)
    with pytest.raises(ArgumentError, match="another conversion is writing"):
        convert_cpu(source, out, resume=True)
    assert files(out) == before
    os.close(held)
    convert_cpu(source, out, resume=True)


def test_an_error_keeps_finished_layers(tmp_path, source):
    """And resumed, one more of them takes nothing away."""
    out = tmp_path / "out"

    def fail(layer, *_):
        if layer == 2:
            raise CheckpointError("a broken disk")

    for resume in (False, True):
        with pytest.raises(CheckpointError, match="a broken disk"):
            convert_cpu(source, out, progress=fail, resume=resume)
        assert tuple(finished_layers(out)) == (0,)
        assert files(out).keys() == {UNFINISHED, "experts-00000.safetensors"}
