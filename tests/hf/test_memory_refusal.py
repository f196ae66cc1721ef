"""A model that does not fit is refused before a weight is read, with the numbers."""

from __future__ import annotations

import pytest

import coterie
from coterie import tiny
from coterie.errors import DeviceError
from coterie.hf.quantizer import CoterieQuantizer


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(monkeypatch, tmp_path):
    coterie.from_pretrained(tiny.PATH, experts="int4").save_pretrained(tmp_path)
    monkeypatch.setattr(CoterieQuantizer, "_pack", lambda *_: pytest.fail("packed"))
    monkeypatch.setenv("COTERIE_RAM", "2MB")  # the rest takes 0.9 MB, the experts in int4 1.8
    with pytest.raises(DeviceError, match=r"experts in int4 needs 0.00277 GB of RAM, 0.002 GB of .*coterie plan"):
        coterie.from_pretrained(tiny.PATH, experts="int4")
    with pytest.raises(DeviceError, match="needs"):
        coterie.from_pretrained(tmp_path)
    coterie.from_pretrained(tmp_path, mmap=True)
