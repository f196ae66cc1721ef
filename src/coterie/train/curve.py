"""loss.png: the losses of a run over its steps."""

from __future__ import annotations

from pathlib import Path

from coterie.train.metrics import OBJECTIVES, Row


def draw_losses(metrics: list[Row], path: Path, title: str, unit: str) -> None:
    """Training (the objective, and what is minimised where the router's loss is added to it) and evaluation, as a PNG.

    unit: what a loss is the mean of.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    apart = next((name for name in OBJECTIVES if any(name in row for row in metrics)), None)
    lines = [(apart or "loss", "training", "-", "C0"), ("eval_loss", "evaluation", "o-", "C1")]
    if apart:
        lines.insert(1, ("loss", "training, with the router's balancing loss", ":", "C0"))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, label, style, color in lines:
        points = [(row["step"], row[name]) for row in metrics if name in row]
        if points:
            style = "o" + style if len(points) == 1 and "o" not in style else style
            axes.plot(*zip(*points, strict=True), style, label=label, color=color, markersize=4)
    axes.set_title(title, fontsize="medium")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(f"loss (nats per {unit})")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=120)
