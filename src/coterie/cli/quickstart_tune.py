"""The second half of the quickstart: the bundled model fine-tuned on int4 experts, saved, loaded again and compared."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.markup import escape

from coterie.cli.console import console, significant, size, table
from coterie.train import demo

BAR = 40  # of the highest loss
ANSWER = 160  # characters


def fine_tune(base: Path, folder: Path, tokenizer: Any, doing: Callable[[str], None]) -> None:
    """Trains an adapter for the packed checkpoint `base` into `folder`, and prints what it changed."""
    chats = len(demo.chats("train"))
    title = f"[bold]Fine-tuning on int4 experts[/]: LoRA on {chats} chats about Python; loss by step"
    console.print(f"\n{title}", highlight=False)
    highest = 0.0

    def on_loss(step: int, loss: float) -> None:
        nonlocal highest
        highest = max(highest, loss)
        console.print(f"{step:5d}  {loss:.2f} [cyan]{'█' * round(BAR * loss / highest)}[/]", highlight=False)

    tuned = demo.fine_tune(base, folder, tokenizer, doing, on_loss)
    measured = tuned.before, tuned.after, tuned.reloaded
    result = table(
        f"Loss on held-out questions, before and after {significant(tuned.seconds)} s of training",
        "",
        "before",
        "after",
        "saved, reloaded",
    )
    result.add_row("what it was taught, asked in other words", *(f"{one.taught:.3f}" for one in measured))
    result.add_row("what it was not taught", *(f"{one.untaught:.3f}" for one in measured))
    console.print()
    console.print(result)
    console.print(f"The adapter is PEFT's own, {size(tuned.nbytes)}; the packed experts are as they were.", style="dim")
    for question, old, new in zip(demo.QUESTIONS, tuned.before.answers, tuned.reloaded.answers, strict=True):
        console.print(f"\n[bold]{escape(question)}[/]", highlight=False)
        for when, text in (("before", old), ("after", new)):
            console.print(f"[dim]{when + ':':8}[/]{escape(textwrap.shorten(text, ANSWER, placeholder=' ...'))}")
