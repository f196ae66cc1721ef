"""What a training run shows and leaves behind: progress, metrics.jsonl, loss.png, a profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

METRICS = "metrics.jsonl"
CURVE = "loss.png"
TRACE = "trace.json"
SNAPSHOT = "memory.pickle"


class MetricsFile(TrainerCallback):
    """Appends what the trainer logs to metrics.jsonl, one line a log; a resumed run goes on where it had stopped."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kept = [row for row in read_metrics(self.path) if row["step"] <= state.global_step] if state.global_step else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        if logs:
            row = {"step": state.global_step, **logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; none where there is no file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


class ProgressBar(TrainerCallback):
    """A bar with loss and time left on a terminal, else a line a log."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.console = console
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("training", total=None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        loss = next((f"{name} {logs[name]:.4f}" for name in ("loss", "eval_loss") if name in (logs or {})), None)
        if loss is None:
            return
        self.bar.update(self.task, description=loss)
        if not self.console.is_terminal:
            self.console.print(f"step {state.global_step}/{state.max_steps}: {loss}", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()


class Profiler(TrainerCallback):
    """Profiles `steps` steps before which `start - 1` have run: a Chrome trace; on CUDA also a memory snapshot."""

    def __init__(self, folder: Path, steps: int, start: int) -> None:
        self.folder, self.first, self.last = folder, start - 1, start - 1 + steps
        self.profile: profile | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step != self.first:
            return
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.memory._record_memory_history()
        self.profile = profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])])
        self.profile.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.last:
            self.finish()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.finish()

    def finish(self) -> None:
        if self.profile is None:
            return
        self.profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.profile.export_chrome_trace(str(self.folder / TRACE))
        self.profile = None
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(self.folder / SNAPSHOT))
            torch.cuda.memory._record_memory_history(enabled=None)


def draw_losses(metrics: list[dict[str, float]], path: Path) -> None:
    """The loss of training and evaluation over the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("loss", "training"), ("eval_loss", "evaluation")):
        points = [(row["step"], row[name]) for row in metrics if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if len(points) < 30 else None, markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
