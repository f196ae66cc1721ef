"""Runs that end early: on a signal with a checkpoint to go on from; for a crash there is one of the last hour."""

from __future__ import annotations

import json
import os
import signal
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl

from coterie import cli
from coterie.train.example import DATA
from coterie.train.stop import Stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_with_a_checkpoint(number, write, configure, train, monkeypatch, capsys, tmp_path):
    """The step at hand is the last; with --resume the losses are those of a run without a stop."""
    options = {"max_steps": 4, "test_datasets": [{"path": str(DATA / "heldout.jsonl")}]}
    whole = train(configure(**options, output_dir=str(tmp_path / "whole")))
    file = write(**options)
    stock = Stop.on_step_begin

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), number)
        return stock(self, args, state, control, **kwargs)

    def sft(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["coterie", "sft", str(file), *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0

    before = signal.getsignal(number)
    monkeypatch.setattr(Stop, "on_step_begin", on_step_begin)
    assert sft() == 128 + number
    assert signal.getsignal(number) == before
    err = " ".join(capsys.readouterr().err.split())
    assert f"stopped after step 2 of 4, which is saved; to go on: coterie sft {file} --resume" in err
    output = tmp_path / "output"
    assert {path.name for path in output.iterdir() if path.name != "README.md"} == {"checkpoint-2", "metrics.jsonl"}
    assert "eval_loss" not in (output / "metrics.jsonl").read_text()

    monkeypatch.setattr(Stop, "on_step_begin", stock)
    assert sft("--resume") == 0
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["loss"]) for r in rows if "loss" in r] == [(r["step"], r["loss"]) for r in whole]


@pytest.fixture
def interruptible():
    """Python's own handling of Ctrl-C, which a process of the test suite may be without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_interrupt_stops_at_once(interruptible):
    stop = Stop(Console(quiet=True))
    with pytest.raises(KeyboardInterrupt), stop.listening():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


def test_an_hour_is_the_most_that_is_at_risk(tmp_path):
    """A checkpoint an hour after the last; one that is there for a crash alone goes when the next is whole."""
    now = 0.0
    stop = Stop(Console(quiet=True), clock=lambda: now)
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = SimpleNamespace(global_step=0, max_steps=100, is_world_process_zero=True)
    stop.on_train_begin(args, state, TrainerControl())

    def step(minutes: int, should_save: bool = False) -> list[str]:
        nonlocal now
        now += 60 * minutes
        state.global_step += 1
        control = TrainerControl(should_save=should_save)
        stop.on_step_end(args, state, control)
        if control.should_save:
            (tmp_path / f"checkpoint-{state.global_step}").mkdir()
            stop.on_save(args, state, control)
        return sorted(path.name[11:] for path in tmp_path.iterdir())

    assert step(59) == []
    assert step(1) == ["2"]
    assert step(59) == ["2"]
    assert step(1) == ["4"]
    assert step(30, should_save=True) == ["5"]
    assert step(59) == ["5"]
    assert step(1) == ["5", "7"]
    stop.every = None
    assert step(1000) == ["5", "7"]
