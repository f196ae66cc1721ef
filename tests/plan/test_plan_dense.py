"""What plan says of packed linear layers, against what models with them take."""

from __future__ import annotations

import json

import pytest
from hf.tiny_models import STRUCTURES, make
from typer.testing import CliRunner

import coterie
from coterie import plan, tiny
from coterie.checkpoints.packed_formats import ModelFormats
from coterie.cli import app
from coterie.errors import ArgumentError
from coterie.formats import resolve
from coterie.hf.converting import convert
from coterie.hf.dense import packed_linears

RATES = plan.Rates(bandwidth=1e9, bf16=2e9, int8=4e9)
INT4 = ModelFormats(resolve("int4"))


def anatomy_of(path):
    return plan.inspect(plan.open_source(str(path)).config)


@pytest.mark.parametrize("family", STRUCTURES)
def test_bytes_are_those_of_the_packed_model(family, tmp_path):
    make(family).save_pretrained(tmp_path)
    anatomy, plain = anatomy_of(tmp_path), coterie.from_pretrained(tmp_path)
    skip = "out_proj" if family == "lfm2_moe" else "o_proj"
    model = coterie.from_pretrained(tmp_path, dense="int8", dense_skip=skip)
    found = plan.dense(anatomy, resolve("int8"), [skip])
    linears = [linear for _, linear in packed_linears(model)]
    assert (found.count, found.nbytes) == (len(linears), sum(linear.nbytes for linear in linears))
    assert found.saved == plain.get_memory_footprint() - model.get_memory_footprint()
    assert found.read_saved == sum(2 * x.out_features * x.in_features - x.nbytes for x in linears)
    head = model.get_output_embeddings()
    products = sum(linear.out_features * linear.in_features for linear in linears)
    assert found.prompt_parameters == products - head.in_features * head.out_features


def test_a_tied_head_is_a_copy():
    anatomy = anatomy_of(tiny.PATH)
    found, without = (plan.dense(anatomy, resolve("int8"), skip) for skip in ((), ["lm_head"]))
    packed = resolve("int8").matrix_nbytes(2048, 128)
    assert found.saved == without.saved - packed
    assert found.read_saved == without.read_saved + 2 * 2048 * 128 - packed


def test_what_is_needed_and_the_bounds():
    anatomy, spec = anatomy_of(tiny.PATH), INT4
    dense = plan.dense(anatomy, resolve("int8"))
    plain, found = plan.estimate(anatomy, spec, 10**10, RATES), plan.estimate(anatomy, spec, 10**10, RATES, dense)
    assert plain.ram - found.ram == dense.saved
    assert 1e9 / plain.decode - 1e9 / found.decode == pytest.approx(dense.read_saved)
    assert 1 / plain.prefill - 1 / found.prefill == pytest.approx(2 * dense.prompt_parameters * (1 / 2e9 - 1 / 4e9))
    before, after = (plan.conversion(anatomy, spec, 1e9, 1e9, packed) for packed in (None, dense))
    assert before.written - after.written == dense.saved and before.read == after.read
    train = plan.train_inspect(plan.open_source(str(tiny.PATH)).config, anatomy, tokens=64)
    weights = [plan.train_estimate(anatomy, train, spec, 10**10, packed).weights for packed in (None, dense)]
    assert weights[0] - weights[1] == dense.saved


def test_what_is_sensible():
    """Much of what a token reads, or little: here the cache is what there is most of."""
    config = plan.open_source(str(tiny.PATH)).config
    short, long = (plan.inspect(config, context) for context in (1, 8192))
    assert plan.sensible(short, INT4) == plan.dense(short, resolve("int8"))
    assert plan.sensible(long, INT4) is None


def test_groups_that_do_not_divide(tmp_path):
    config = {**json.loads((tiny.PATH / "config.json").read_text()), "head_dim": 12}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArgumentError, match=r"o_proj: 48 columns are not a multiple of group_size=32"):
        plan.dense(anatomy_of(tmp_path), resolve("int4"))


def test_a_packed_folder(tmp_path):
    report = convert(tiny.PATH, tmp_path / "out", dense="int8", dense_skip="o_proj")
    source = plan.open_source(str(tmp_path / "out"))
    assert (source.dense, source.dense_skip) == (resolve("int8"), ("o_proj",))
    assert source.dense_format() == source.dense_format("int8") == resolve("int8")
    with pytest.raises(ArgumentError, match="linear layers are packed as int8, and do not become int4"):
        source.dense_format("int4")
    assert plan.dense(plan.inspect(source.config), source.dense, source.dense_skip).count == report.linear_errors.count
    ran = CliRunner().invoke(app, ["plan", str(tmp_path / "out"), "--bandwidth", "20GB"])
    said = " ".join(ran.output.split())
    assert ran.exit_code == 0 and "experts in int4 in groups of 32, linear layers in int8." in said
    assert "13 linear layers in int8 (406 kB), what remains in bf16 (675 kB)" in said


def test_the_command():
    command = ["plan", str(tiny.PATH), "--experts", "int4", "--bandwidth", "20GB", "--context", "1"]
    said = " ".join(CliRunner().invoke(app, command).output.split())
    assert "Sensible on a CPU: --dense int8" in said and "the head is a copy" in said
    said = " ".join(CliRunner().invoke(app, [*command, "--dense", "int8"]).output.split())
    assert "17 linear layers in int8" in said and "Sensible" not in said
    said = " ".join(CliRunner().invoke(app, [*command, "--context", "8192"]).output.split())
    assert "--dense saves little" in said
