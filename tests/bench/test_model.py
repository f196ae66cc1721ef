"""A made model that is measured: it is the one that was asked for, computes as a loaded one, and is timed right."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from hf.tiny_models import STRUCTURES, make
from typer.testing import CliRunner

import coterie
from coterie import tiny
from coterie.bench.decode import Decoder
from coterie.bench.layer import OURS
from coterie.bench.like import config_like
from coterie.bench.model import ModelBench
from coterie.bench.random_model import packed_twin, random_model
from coterie.cli import app
from coterie.errors import ArgumentError, DeviceError
from coterie.formats import resolve
from coterie.hf.clock import Clock
from coterie.hf.dense import packed_linears
from coterie.hf.inference import attention
from coterie.hf.modules import packed_modules


def test_the_named_shape_is_the_published_one():
    config, whole = config_like("qwen3-30b")
    assert (whole, config.num_hidden_layers, config.vocab_size) == (48, 48, 151936)
    config, whole = config_like("qwen3-30b", layers=3, vocabulary=1000)
    assert (whole, config.num_hidden_layers, config.vocab_size) == (48, 3, 1000)
    for sizes in ({"layers": 0}, {"vocabulary": 0}):
        with pytest.raises(ArgumentError, match="expected both at least 1"):
            config_like("qwen3-30b", **sizes)


def test_layers_are_the_first_ones(tmp_path):
    make("qwen3_next").config.save_pretrained(tmp_path)
    config, whole = config_like(str(tmp_path), layers=1)
    assert whole == 2 and config.num_hidden_layers == 1 and config.layer_types == ["linear_attention"]
    config, _ = config_like(str(tmp_path / "config.json"), layers=5)
    assert config.num_hidden_layers == 2


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next"])
def test_a_decoder_goes_back_to_the_end_of_its_prompt(family):
    """Also where tokens cannot be taken out of the cache again: a window is full, a state has them all."""
    decoder, seen = Decoder(make(family), torch.arange(3, 23)[None], tokens=4), []
    for _ in range(13):
        decoder()
        seen.append(decoder.cache.get_seq_length())
    assert seen == [21, 22, 23, 24, 21, 22, 23, 24, 21, 22, 23, 24, 21]


@pytest.mark.parametrize("family", STRUCTURES)
@torch.inference_mode()
def test_any_family_is_made_as_it_is_loaded(family, tmp_path):
    """The weights of the made model, saved and loaded by Transformers, are packed to the same logits."""
    config = make(family).config
    theirs = random_model(config, "eager")
    ours = packed_twin(theirs, resolve("int8"))
    theirs.save_pretrained(tmp_path)
    loaded = coterie.from_pretrained(tmp_path, experts="int8", scale_search=True)
    ids = torch.arange(20).view(1, -1)
    found, expected = ours(ids).logits, loaded(ids).logits
    if family == "jamba":  # exp of what is mapped from a file, at any byte, rounds otherwise
        assert torch.allclose(found, expected, atol=0.05)
    else:
        assert torch.equal(found, expected)
    assert ours.config._attn_implementation == loaded.config._attn_implementation
    assert [type(m).__mro__[1] for m in ours.modules()] == [type(m).__mro__[1] for m in loaded.modules()]


def test_what_is_measured_is_packed():
    bench = ModelBench(str(tiny.PATH), layers=2, vocabulary=300, format="int8", dense="int8", prompt=5)
    ours, theirs = bench.models[OURS], bench.models["grouped_mm"]
    assert [packed.format for _, packed in packed_modules(ours)] == ["int8"] * 2
    assert {linear.spec.name for _, linear in packed_linears(ours)} == {"int8"} and not list(packed_linears(theirs))
    assert (bench.layers, bench.vocabulary, bench.ids.shape) == (2, 300, (1, 5))
    prefill, decode = bench.prefill(0.01, 1), bench.decode(0.01, 1)
    assert prefill.tokens_per_second > 0 and decode.ratio > 0
    alone = ModelBench(str(tiny.PATH), layers=2, vocabulary=300, format="int8", dense="int8", prompt=5, peer="none")
    assert list(alone.models) == [OURS] and alone.decode(0.01, 1).ratio is None
    same = [next(iter(packed_modules(model)))[1].experts.dequantize() for model in (ours, alone.models[OURS])]
    assert all(torch.equal(a, b) for a, b in zip(*same, strict=True))


def test_a_peer_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setenv("COTERIE_RAM", "1MB")
    with pytest.raises(DeviceError, match="--peer none does without"):
        ModelBench(str(tiny.PATH))


def test_a_profile_adds_up():
    bench = ModelBench(str(tiny.PATH), format="int8", dense="int8", prompt=5, peer="none")
    model = bench.models[OURS]
    found = bench.profile()
    experts = next(iter(packed_modules(model)))[1].experts
    used = model.config.num_experts_per_tok / model.config.num_experts
    inside = sum(linear.nbytes for name, linear in packed_linears(model) if ".0." in name)
    assert len(found.layers) == bench.layers == bench.whole_layers
    assert found.layers[0].nbytes == inside + used * experts.nbytes
    head = dict(packed_linears(model)).get("lm_head")
    assert found.outside.nbytes == (head or model.get_output_embeddings().weight).nbytes
    assert all(part.attention > 0 and part.products > 0 and part.rest > 0 for part in found.layers)
    assert found.outside.attention == 0 and found.bandwidth > 0
    assert found.seconds_of(bench.layers) == pytest.approx(found.seconds)


def test_time_goes_where_it_is_spent(monkeypatch):
    """A hundredth of a second more in one layer's attention, in another's experts, and before them."""
    model = ModelBench(str(tiny.PATH), format="int8", prompt=5, peer="none").models[OURS]
    decoder = Decoder(model, torch.arange(5).view(1, -1))
    layers = model.get_decoder().layers

    now = [0.0]  # a clock on which nothing else takes time
    monkeypatch.setattr("coterie.hf.clock.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(call):
        def slowed(*args, **kwargs):
            now[0] += 0.02
            return call(*args, **kwargs)

        return slowed

    attend = attention.attention_forward
    monkeypatch.setitem(
        attention.AttentionInterface._global_mapping,
        attention.NAME,
        lambda module, *args, **kwargs: (slow(attend) if module.layer_idx == 0 else attend)(module, *args, **kwargs),
    )
    monkeypatch.setattr(layers[1].mlp.experts, "forward", slow(layers[1].mlp.experts.forward))
    monkeypatch.setattr(layers[2], "forward", slow(layers[2].forward))
    monkeypatch.setattr(model.lm_head, "forward", slow(model.lm_head.forward))
    with Clock(model) as clock:
        decoder()
        decoder()
    assert len(clock.forwards) == 2
    for outside, *parts in clock.forwards:
        assert [[part.attention > 0.01, part.products > 0.01, part.rest > 0.01] for part in parts[:3]] == [
            [True, False, False],
            [False, True, False],
            [False, False, True],
        ]
        assert sum(part.seconds for part in parts) > 0.03 and outside.seconds > 0
    before = len(clock.forwards)
    decoder()
    assert len(clock.forwards) == before


def test_the_command():
    command = ["bench", "model", "--like", str(tiny.PATH), "--dense", "int8", "--prompt", "4", "--seconds", "0.01"]
    ran = CliRunner().invoke(app, [*command, "--rounds", "1", "--peer", "none", "--profile"])
    said = " ".join(ran.output.split())
    assert ran.exit_code == 0, ran.output
    layers = json.loads((tiny.PATH / "config.json").read_text())["num_hidden_layers"]
    assert f"of {layers} layers of" in said and "dense int8" in said and "ratio" not in said
    assert "layer 0" in said and "at memory speed" in said and "tokens/s." in said
