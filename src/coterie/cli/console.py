"""What the commands print with: one console for results, one for errors, and how numbers are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.table import Table

console = Console()
errors = Console(stderr=True)


@contextmanager
def telling_of_ctrl_c(kept: Callable[[], str]) -> Iterator[None]:
    """Where Ctrl-C stops the block, says what it left behind, and ends the command."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"coterie: stopped; {kept()}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None


def table(title: str, *columns: str) -> Table:
    """A table whose first column is text and whose others are figures."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    return made


def facts(title: str) -> Table:
    """A two-column list of names and what was found."""
    made = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=False,
        box=None,
        padding=(0, 2, 0, 0),
    )
    made.add_column(style="dim", no_wrap=True)
    made.add_column()
    return made


def size(nbytes: float) -> str:
    """Bytes in the unit that suits them (10^3 apart): "1.15 GB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{significant(nbytes / scale)} {unit}"
    return f"{int(nbytes)} B"


def count(number: int) -> str:
    """A number of parameters: "30.5B", "3.61M"."""
    return f"{significant(number / 1e9)}B" if number >= 1e9 else f"{significant(number / 1e6)}M"


def significant(value: float) -> str:
    """Three significant digits, without an exponent: "0.0123", "4.56", "78.9", "1234"."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}"
