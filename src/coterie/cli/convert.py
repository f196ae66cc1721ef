"""coterie convert: checkpoints into other formats, and what came of it."""

from __future__ import annotations

import typer

from coterie.cli import (
    convert_compare,
    convert_cpu,
    convert_dequantize,
    convert_gpu,
    convert_merge,
    convert_verify,
)

app = typer.Typer(help="Convert checkpoints, put them together, compare them.", no_args_is_help=True)
app.command("cpu")(convert_cpu.cpu)
app.command("gpu")(convert_gpu.gpu)
app.command("merge")(convert_merge.merge)
app.command("dequantize")(convert_dequantize.dequantize)
app.command("compare")(convert_compare.compare)
app.command("verify")(convert_verify.verify)
