"""coterie convert dequantize: quantised checkpoints and GGUF files as plain folders in bf16."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.console import console, facts, significant, size, telling_of_ctrl_c
from coterie.cli.progress import ConversionProgress


def dequantize(
    input_path: Annotated[
        Path, typer.Option("--input-path", "-i", help="Folder of a quantised checkpoint, or a GGUF file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the checkpoint in bf16.")],
    files: Annotated[
        str | None, typer.Option(help="Only these of its .safetensors files, with commas between them. [default: all]")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the checkpoint, or with --files the files, that are there.")
    ] = False,
) -> None:
    """Write a quantised checkpoint in bf16, on the CPU alone: experts and everything else.

    A matrix is in memory at a time. Files keep their names. Of a GGUF file it makes a folder as Transformers has it,
    with the original's names, config and tokenizer; what is F32 or F16 there stays so. With --files the work can be
    shared out: whoever writes the last of them writes config.json and the index.
    """
    from coterie.hf.converting import dequantize

    names = None if files is None else [name.strip() for name in files.split(",") if name.strip()]
    kept = f"nothing is kept in {output}" if names is None else f"files that are whole stay in {output}"
    with telling_of_ctrl_c(lambda: kept), ConversionProgress("file", "tensor") as progress:
        done = dequantize(input_path, output, files=names, overwrite=overwrite, progress=progress)
    summary = facts("In bf16")
    summary.add_row("folder", str(output))
    summary.add_row("files", str(len(done.files)) + ("" if done.whole else "; others are still to be written"))
    summary.add_row("dequantised", f"{done.matrices} weights")
    summary.add_row("size", f"{size(done.source_bytes)} became {size(done.bytes)}")
    summary.add_row("time", f"{significant(done.seconds)} s, {size(done.bytes / done.seconds)}/s written")
    console.print(summary)
