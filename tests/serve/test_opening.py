"""What `coterie chat` and `coterie serve` open a model as."""

from __future__ import annotations

import pytest

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


def test_linear_layers_are_packed():
    model, _ = open_model(PLAIN, {})
    assert {linear.spec.name for _, linear in packed_linears(model)} == {"int8"}
