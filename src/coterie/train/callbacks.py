"""What a training run shows while it runs, and its profile."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from coterie.train.metrics import shown

TRACE = "trace.json"
SNAPSHOT = "memory.pickle"


class ProgressBar(TrainerCallback):
    """A bar with loss and time left on a terminal, else a line a log: losses, seconds a step and time left."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.console, self.clock = console, clock
        self.bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("training", total=None)
        self.begun, self.first = clock(), 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.first = self.clock(), state.global_step
        self.bar.update(self.task, total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        losses = shown(logs or {})
        if losses is None:
            return
        self.bar.update(self.task, description=losses)
        if not self.console.is_terminal:
            line = f"step {state.global_step}/{state.max_steps}: {losses}{self.pace(state)}"
            self.console.print(line, highlight=False, soft_wrap=True)

    def pace(self, state: Any) -> str:
        """How a line goes on: ", 3.2 s a step, 1 h 05 min left", by the steps since the run began or was resumed."""
        steps = state.global_step - self.first
        if not steps:
            return ""
        seconds = (self.clock() - self.begun) / steps
        return f", {seconds:.3g} s a step, {duration(seconds * (state.max_steps - state.global_step))} left"

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.stop()


def duration(seconds: float) -> str:
    """A time in the units that suit it: "42 s", "5 min", "1 h 05 min", "2 d 03 h"."""
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 24 else f"{hours // 24} d {hours % 24:02d} h"


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
