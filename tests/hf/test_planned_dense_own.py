"""What plan says of linear layers that keep their codes, against what models that are opened so take."""

from __future__ import annotations

import pytest
import torch
from gguf_models import write_qwen
from quantised_checkpoints import METHODS
from test_quantised_loading import write
from tiny_models import make
from typer.testing import CliRunner

import coterie
from coterie import machine, plan
from coterie.checkpoints.gguf_file import GgufFile
from coterie.checkpoints.scheme import Scheme
from coterie.cli import app
from coterie.errors import ArgumentError
from coterie.hf.dense import packed_linears

ROPE = {"rope_type": "default", "rope_theta": 500000.0}
V, K = "model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.k_proj"
Q4_K_M = {"": "Q4_K", V: "Q6_K", "lm_head": "Q6_K", K: "F16"}
FORMATS = "q4_k in groups of 256 and q6_k in groups of 256"
RATES = plan.Rates(bandwidth=1e9, bf16=2e9, int8=4e9)


def gguf(folder, **changes):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64}
    model = make("qwen3_moe", torch.float32, rope_parameters=ROPE, **sizes, **changes)
    return write_qwen(folder / "model.gguf", model, experts="Q4_K", rest=Q4_K_M)


def nothing_read(*_):
    raise AssertionError("weights are read")


def planned(path, monkeypatch):
    """Without a weight being read."""
    with monkeypatch.context() as patched:
        patched.setattr(GgufFile, "data", nothing_read)
        patched.setattr(Scheme, "read", nothing_read)
        source = plan.open_source(str(path))
        anatomy = plan.inspect(source.config)
        return source, anatomy, plan.dense(anatomy, source.dense_format("own"))


def assert_taken(path, found):
    """The bytes and formats of the model that is opened."""
    model, plain = (coterie.from_pretrained(path, dense=dense) for dense in ("own", None))
    linears = dict(packed_linears(model))
    assert (found.count, found.nbytes) == (len(linears), sum(linear.nbytes for linear in linears.values()))
    assert found.saved == plain.get_memory_footprint() - model.get_memory_footprint()
    assert set(found.prompt) == {linear.spec for linear in linears.values()}


@pytest.mark.parametrize("tied", [False, True])
def test_gguf(tied, tmp_path, monkeypatch):
    path = gguf(tmp_path, tie_word_embeddings=tied)
    source, anatomy, found = planned(path, monkeypatch)
    assert found.count == 8
    assert_taken(path, found)
    own = source.own
    before, after = (plan.estimate(anatomy, own, 10**10, RATES, dense) for dense in (None, found))
    assert before.ram - after.ram == found.saved
    assert 1e9 / before.decode - 1e9 / after.decode == pytest.approx(found.read_saved)
    assert after.prefill > before.prefill


@pytest.mark.parametrize(
    "method", ["fp8 by blocks", "compressed-tensors int8 by rows", "AWQ", "GPTQ", "ModelOpt nvfp4"]
)
def test_what_others_quantised(method, tmp_path, monkeypatch):
    quantise, config, _ = METHODS[method]
    folder = write(tmp_path / "in", "qwen3_moe", quantise, config)
    _, _, found = planned(folder, monkeypatch)
    assert found.count == 8
    assert_taken(folder, found)


def test_what_there_is_none_of(tmp_path):
    make("qwen3_moe").save_pretrained(tmp_path / "plain")
    assert plan.open_source(str(tmp_path / "plain")).dense_format("own") is None
    quantise, config, _ = METHODS["fp8 by blocks"]
    folder = write(tmp_path / "in", "qwen3_moe", quantise, config)
    with pytest.raises(ArgumentError, match="which linear layers are quantised, and how, is in its files"):
        plan.open_source(str(folder / "config.json")).dense_format("own")


def test_the_command(tmp_path, monkeypatch):
    for rate in ("dot_rate", "row_rate", "attention_rate", "packing_rate"):
        monkeypatch.setattr(machine, rate, lambda *_: 1e9)
    monkeypatch.setattr(plan, "overhead", lambda: (0.0, 0.0))

    def said(*options):
        ran = CliRunner().invoke(app, ["plan", str(path), "--bandwidth", "10GB", "--experts", "q4_k", *options])
        assert ran.exit_code == 0, ran.output
        return " ".join(ran.output.split())

    path = gguf(tmp_path)
    text = said("--dense", "own")
    assert f"in q4_k in groups of 256, 8 linear layers theirs in {FORMATS}; the rest is" in text
    assert f"8 linear layers in {FORMATS} (" in text
    assert "more until they are" not in text and "Sensible" not in text
    assert f"8 linear layers theirs in {FORMATS}" in said()
    plain = said("--dense", "none", "--context", "1")
    assert "linear layers theirs" not in plain and "Sensible on a CPU: --dense int8" in plain
    assert "more until they are" in said("--dense", "int8")
