"""benchmarks/gpu.py on the CPU, tiny: every section computes, and is right."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from coterie.formats import FORMATS

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(monkeypatch, output: Path, *more: str) -> dict:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--device", "cpu", "--tiny", "--output", str(output), *more])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return json.loads(output.read_text())


def test_every_section(tmp_path, monkeypatch, capsys):
    found = run(monkeypatch, tmp_path / "gpu.json")
    assert all("figures" in section for section in found["sections"].values()), found["sections"]
    checks = [section["figures"] for name, section in found["sections"].items() if name.startswith("check")]
    places = [figures for check in checks for figures in check.values() if isinstance(figures, dict)]
    assert len(places) == 2 * len(checks) == 2 * (len(FORMATS) + 6) and all(place["right"] for place in places), places
    times = found["sections"]["times int4"]["figures"]
    assert set(times) == {f"{kind}, T={t}" for kind in ("forward", "step", "step with LoRA") for t in (1, 16)}
    assert len(found["sections"]["decode"]["figures"]) == 6
    streamed = [name for name in found["sections"]["stream"]["figures"] if name.startswith("streamed")]
    assert streamed == ["streamed, forward, T=1", "streamed, step, T=1"]
    assert "wrong or missing: nothing" in capsys.readouterr().out
    assert found["device"]["name"] == "cpu" and found["cpu"]["isa"] and found["versions"]["torch"]


def test_a_section_that_fails_is_written_down(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("coterie.bench.timing.median_seconds", lambda *_: 1 / 0)
    found = run(monkeypatch, tmp_path / "gpu.json")
    failed = [name for name, section in found["sections"].items() if "error" in section]
    times = ["times int4", "times grouped_mm bf16", "times bf16", "times eager bf16"]
    assert failed == [*times, "stream", "decode", "dequantise"]
    assert "ZeroDivisionError" in found["sections"]["decode"]["error"]
    assert "wrong or missing: times int4" in capsys.readouterr().out


def test_no_section_begins_late(tmp_path, monkeypatch):
    sections = run(monkeypatch, tmp_path / "gpu.json", "--minutes", "0")["sections"]
    assert all(section["skipped"] == "no time left" for section in sections.values())
    assert len(sections) == len(FORMATS) + 13


@pytest.mark.parametrize("name", ["grouped_dense", "eager_dense"])
def test_the_others_compute_the_same(name):
    import torch

    script = runpy.run_path(str(SCRIPT))
    bench = script["Bench"]("cpu", True, Path(), 1)
    shape = script["TINY"]
    dense = script["Dense"](bench, shape, script[name])
    x, ids, weights = bench.batch(shape, 20)
    lora = script["ExpertLora"](**bench.lora(shape, 4), scaling=2.0)
    gate, up = dense.gate_up.chunk(2, 1)
    expected = script["reference"].forward(x, ids, weights, gate, up, dense.down, lora=lora)
    found = dense(x, ids, weights, lora)
    assert found.dtype == torch.bfloat16 and script["relative"](found, expected) < 0.02
