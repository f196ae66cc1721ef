"""What a run shows: a line a log outside of a terminal, and the picture of its losses."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from coterie.train.callbacks import ProgressBar, duration
from coterie.train.curve import draw_losses

DPO = {"loss": 0.734, "dpo_loss": 0.6931, "aux_loss": 4.09}


def test_a_line_a_log_has_the_pace_since_the_run_was_resumed():
    text, now = io.StringIO(), [100.0]
    bar = ProgressBar(Console(file=text), clock=lambda: now[0])
    state = SimpleNamespace(global_step=4, max_steps=10)
    bar.on_train_begin(None, state, None)
    now[0], state.global_step = 112.0, 7
    bar.on_log(None, state, None, logs=DPO)
    bar.on_log(None, state, None, logs={"eval_loss": 1.25})
    bar.on_log(None, state, None, logs={"train_runtime": 12.0})
    assert text.getvalue().splitlines() == [
        "step 7/10: loss 0.7340 (DPO 0.6931, router 0.0409), 4 s a step, 12 s left",
        "step 7/10: evaluation loss 1.2500, 4 s a step, 12 s left",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (3569, "59 min"), (3600, "1 h 00 min"), (90_000, "1 d 01 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_the_picture_says_what_it_shows(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    rows = [{"step": 1, **DPO}, {"step": 2, "eval_loss": 1.0}, {"step": 2, **DPO}]
    draw_losses(rows, tmp_path / "loss.png", "a model, experts in int4", "pair")
    axes = drawn[0]
    assert (axes.get_title(), axes.get_ylabel()) == ("a model, experts in int4", "loss (nats per pair)")
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert lines == {
        "training": [0.6931, 0.6931],
        "training, with the router's balancing loss": [0.734, 0.734],
        "evaluation": [1.0],
    }
