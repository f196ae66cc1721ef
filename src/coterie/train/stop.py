"""A run that ends early without losing what it did: on Ctrl-C, when the system stops it, and on a crash."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import distributed
from transformers import TrainerCallback

HOUR = 3600.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop(TrainerCallback):
    """On the first SIGINT or SIGTERM the step at hand is finished and a checkpoint written; SIGINT again stops at once.

    every: seconds between checkpoints that are there for a crash alone, each taken away when the next checkpoint is
        whole; None for none.
    """

    def __init__(self, console: Console, every: float | None = HOUR, clock: Callable[[], float] = time.monotonic):
        self.console, self.every, self.clock = console, every, clock
        self.signal: int | None = None
        self.stopping = False
        self.saved = clock()
        self.due = False
        self.passing: Path | None = None  # the last checkpoint that was written for a crash alone

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over; outside of the main thread it cannot."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.receive) for number in SIGNALS}
        self.again = before[signal.SIGINT]
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def receive(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            return
        self.signal = number
        signal.signal(signal.SIGINT, self.again)
        self.console.print("finishing the step, then a checkpoint; Ctrl-C again stops at once", highlight=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = self.clock()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        late = self.every is not None and self.clock() - self.saved >= self.every
        stop, late = anywhere(self.signal is not None, late)
        control.should_log |= stop or state.global_step >= state.max_steps  # the last loss too is told
        if stop and state.global_step < state.max_steps:
            self.stop(control)
        elif late and not control.should_save:
            self.due = control.should_save = True

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (stop,) = anywhere(self.signal is not None)
        if stop and state.global_step < state.max_steps:
            self.stop(control)

    def stop(self, control: Any) -> None:
        self.stopping = control.should_training_stop = control.should_save = True
        control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.stopping:  # it is not the end of an epoch, and the checkpoint is there
            control.should_evaluate = control.should_save = False

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved = self.clock()
        written = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.passing not in (None, written) and state.is_world_process_zero:
            shutil.rmtree(self.passing, ignore_errors=True)
        self.passing, self.due = written if self.due else None, False


def anywhere(*flags: bool) -> list[bool]:
    """Each flag, true where it is in any process: all must do the same."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32)
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    return found.bool().tolist()
