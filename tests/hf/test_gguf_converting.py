"""`convert` with the options of any other source, from a GGUF file; what is checked and verified of one."""

from __future__ import annotations

import pytest
import torch
from gguf_models import MIXED, write_qwen
from tiny_models import make
from typer.testing import CliRunner

import coterie
from coterie.checkpoints import open_reader
from coterie.cli import app
from coterie.convert import finished_layers
from coterie.convert.verify import verify
from coterie.errors import ArgumentError
from coterie.hf.converting import convert, merge

ROPE = {"rope_type": "default", "rope_theta": 500000.0}


def written(path, kind):
    stock = make("qwen3_moe", torch.float32, norm_topk_prob=True, rope_parameters=ROPE)
    return write_qwen(path, stock, experts=kind)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interrupted(source, out):
    """A conversion that was stopped in its second layer."""

    def stop(layer, *_):
        if layer == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, out, progress=stop)
    assert tuple(finished_layers(out)) == (0,)


@pytest.mark.parametrize("kind", ["MXFP4", MIXED], ids=str)
def test_resumed(tmp_path, kind):
    file = written(tmp_path / "model.gguf", kind)
    whole = convert(file, tmp_path / "whole")
    interrupted(file, tmp_path / "out")
    report = convert(file, tmp_path / "out", resume=True)
    assert report.resumed == (0,)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (report.errors, report.repacked, report.odd) == (whole.errors, whole.repacked, whole.odd)
    assert report.kept == (kind == "MXFP4")
    assert {path.name for path in tmp_path.iterdir()} == {"model.gguf", "whole", "out"}


def test_resumed_by_the_command(tmp_path):
    file, out = written(tmp_path / "model.gguf", MIXED), tmp_path / "out"
    interrupted(file, out)
    command = ["convert", "cpu", "-i", str(file), "-o", str(out), "--input-type", "gguf", "--resume-layer", "1"]
    ran = CliRunner().invoke(app, command)
    said = " ".join(ran.output.split())
    assert ran.exit_code == 0, ran.output
    assert "16 of 48 matrices have codes that no format holds (Q4_1)" in said
    assert "2 layers, 1 of them before" in said


def test_loose_layers(tmp_path):
    file = written(tmp_path / "model.gguf", "MXFP4")
    convert(file, tmp_path / "whole", dense=None)
    report = convert(file, tmp_path / "loose", loose=True)
    assert report.rest_bytes == 0
    found = files(tmp_path / "loose")
    assert found.keys() == {f"_layer_{n}/_numa_0/experts-0000{n}.safetensors" for n in range(2)}
    for name, layer in found.items():
        assert layer == (tmp_path / "whole" / name.rpartition("/")[2]).read_bytes()
    assert not merge([tmp_path / "loose"], tmp_path / "merged").whole
    assert coterie.Experts.open(tmp_path / "merged", layer=1).format == "mxfp4"
    command = ["convert", "merge", "-i", tmp_path / "loose", "-o", tmp_path / "other", "--original-path", file]
    ran = CliRunner().invoke(app, list(map(str, command)))
    assert ran.exit_code == 0, ran.output
    assert files(tmp_path / "other") == files(tmp_path / "whole")
    convert(file, tmp_path / "first", layers=[0])
    with pytest.raises(ArgumentError, match=r"layers 1 of .*model\.gguf are not there, only 0"):
        merge([tmp_path / "first"], tmp_path / "half", file)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_input_type(tmp_path):
    file = written(tmp_path / "model.gguf", "Q4_1")
    for number, name in enumerate(("gguf", "q4_1")):
        convert(file, tmp_path / str(number), input_type=name, layers=[0])
    for wrong in ("q8_0", "bf16", "gptq"):
        with pytest.raises(ArgumentError, match=f"--input-type is {wrong}: .*model.gguf holds experts in gguf, q4_1; "):
            convert(file, tmp_path / "out", input_type=wrong)
    assert not (tmp_path / "out").exists()


def test_input_type_of_plain_numbers(tmp_path):
    convert(written(tmp_path / "model.gguf", "BF16"), tmp_path / "out", input_type="bf16", layers=[0])


def test_verified_against_the_file(tmp_path):
    file = written(tmp_path / "model.gguf", "MXFP4")
    assert open_reader(file).experts_per_token == make("qwen3_moe").config.num_experts_per_tok
    convert(file, tmp_path / "kept")
    convert(file, tmp_path / "int4", quant_method="int4")
    for folder, worst in (("kept", 0), ("int4", 0.2)):
        checks = verify(tmp_path / folder, file)
        assert [check.layer for check in checks] == [0, 1]
        for check in checks:
            errors = [error.worst for error in check.errors.values()]
            assert all(error == 0 if worst == 0 else 0.01 < error < worst for error in errors)
