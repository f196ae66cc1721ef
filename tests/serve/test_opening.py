"""What `coterie chat` and `coterie serve` open a model as."""

from __future__ import annotations

import pytest
import torch
from gguf_models import write_qwen
from hf.tiny_models import make

import coterie
from coterie import tiny
from coterie.hf.dense import packed_linears
from coterie.serve.opening import dense_format, open_model

PLAIN = str(tiny.PATH)


@pytest.mark.parametrize(
    ("asked", "device", "expected"),
    [("auto", "cpu", "int8"), ("auto", "cuda", None), ("none", "cpu", None), ("mxfp4", "cpu", "mxfp4")],
)
def test_formats_of_linear_layers(asked, device, expected):
    assert dense_format(PLAIN, asked, device) == expected


def test_a_packed_checkpoint_is_opened_as_it_is(tmp_path):
    coterie.from_pretrained(tiny.PATH, experts="int8").save_pretrained(tmp_path / "experts")
    coterie.from_pretrained(tiny.PATH, experts="int8", dense="int4").save_pretrained(tmp_path / "all")
    assert dense_format(str(tmp_path / "experts"), "auto", "cpu") == "int8"
    assert dense_format(str(tmp_path / "all"), "auto", "cpu") is None
    assert dense_format(str(tmp_path / "missing"), "auto", "cpu") == "int8"


@pytest.mark.parametrize(("rest", "expected"), [("Q8_0", "own"), ({"": "Q8_0", "lm_head": "BF16"}, "int8")])
def test_a_gguf_file_keeps_its_own_where_it_has_all(rest, expected, tmp_path):
    stock = make("qwen3_moe", torch.float32, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    file = write_qwen(tmp_path / "model.gguf", stock, rest=rest)
    assert dense_format(str(file), "auto", "cpu") == dense_format(str(tmp_path), "auto", "cpu") == expected
    assert dense_format(str(file), "auto", "cuda") is None


def test_linear_layers_are_packed():
    model, _ = open_model(PLAIN, {})
    assert {linear.spec.name for _, linear in packed_linears(model)} == {"int8"}
