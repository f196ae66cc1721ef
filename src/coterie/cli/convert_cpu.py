"""coterie convert cpu: checkpoints into the packed format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.console import console, errors, significant, size, table, telling_of_ctrl_c
from coterie.cli.progress import ConversionProgress
from coterie.errors import ArgumentError, CheckpointError

if TYPE_CHECKING:
    from coterie.convert import ConversionReport


def cpu(
    input_path: Annotated[
        Path, typer.Option("--input-path", "-i", help="Folder of a Hugging Face MoE checkpoint, or a GGUF file.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New or empty folder for the packed checkpoint.")],
    input_type: Annotated[
        str, typer.Option(help="What the experts are in: bf16, fp8, gptq, gguf ...; anything else is then refused.")
    ] = "auto",
    quant_method: Annotated[
        str | None,
        typer.Option(
            help="Format: int4, int8, bf16, fp8_block, fp8_channel, mxfp4, mxfp8, nvfp4, or GGUF's (q4_k, q6_k ...). "
            "[default: the checkpoint's own if it is quantised, else int4]"
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(help="Columns that share a scale: 32, 64, 128, or 0 for a whole row. [default: int4 32, int8 0]"),
    ] = None,
    zero_point: Annotated[
        bool, typer.Option("--zero-point", help="int4 with zero points: more accurate, slightly larger.")
    ] = False,
    dense: Annotated[
        str,
        typer.Option(
            help="Pack the linear layers outside the experts too, in this format: attention, shared experts, dense "
            "MLPs, the head. own: those that are quantised, as they are; none: no others than experts."
        ),
    ] = "own",
    dense_skip: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="With --dense: layers whose names match are left out. May be repeated."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", "--cpuinfer-threads", help="Threads. [default: all cores]")
    ] = None,
    threadpool_count: Annotated[
        int | None, typer.Option(min=1, help="Accepted; changes nothing: one layout serves any number of NUMA nodes.")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Accepted; changes nothing: it is the CPU that packs.")] = False,
    layers: Annotated[str | None, typer.Option(help="Only these layers, like 0-3 or 5, as loose files.")] = None,
    no_merge_safetensor: Annotated[
        bool, typer.Option("--no-merge-safetensor", help="Experts alone, a folder a layer, to be merged later.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished conversion: finished layers are kept.")
    ] = False,
    resume_layer: Annotated[
        int | None, typer.Option(min=0, help="The same, from this layer on, which with those after it is packed anew.")
    ] = None,
) -> None:
    """Pack the experts of a checkpoint for the CPU, and copy the rest of it.

    The checkpoint is bf16, fp16, fp32, or quantised: FP8 (by blocks or rows), MXFP4, MXFP8, NVFP4, int4 or int8 as
    DeepSeek, Qwen, gpt-oss, compressed-tensors, ModelOpt, GPTQ, AWQ and AutoRound store them. Quantised experts keep
    their codes and scales unless another format is asked for, and so do linear layers outside the experts: attention,
    shared experts, the head. What else is quantised is dequantised.

    Of a GGUF file both keep their codes where a format holds them; the rest lies dequantised beside the output until it
    is done.

    --dense packs those linear layers in one format, whatever they are stored in.

    Reads one expert at a time, so it needs little memory. An interrupted conversion never looks finished, and keeps
    the layers that are: the same command with --resume goes on.
    """
    from coterie.checkpoints.packed_formats import NONE
    from coterie.hf.converting import convert

    if threadpool_count is not None:
        text = "--threadpool-count changes nothing: one layout serves any number of NUMA nodes."
        errors.print(text, highlight=False, soft_wrap=True)
    if gpu:
        errors.print("--gpu changes nothing: it is the CPU that packs.", highlight=False, soft_wrap=True)
    try:
        nothing = f"nothing is kept: what was written to {output} has been removed"
        with telling_of_ctrl_c(lambda: _kept(output) or nothing), ConversionProgress() as progress:
            report = convert(
                input_path,
                output,
                quant_method=quant_method,
                group_size=group_size,
                zero_point=zero_point,
                dense=None if dense == NONE else dense,
                dense_skip=dense_skip or (),
                threads=threads,
                layers=parse_layers(layers) if layers else None,
                progress=progress,
                input_type=input_type,
                loose=no_merge_safetensor,
                resume=resume,
                resume_layer=resume_layer,
            )
    except CheckpointError as error:
        kept = _kept(output)
        raise type(error)(f"{error}. {kept}" if kept else str(error)) from error
    _print(report)


def _kept(output: Path) -> str:
    """What a conversion that was stopped left, and how to go on; "" where it left nothing."""
    from coterie.checkpoints.packed import UNFINISHED
    from coterie.convert import finished_layers

    if not (output / UNFINISHED).exists():
        return ""
    count = len(finished_layers(output))
    layers = {0: "no finished layer is", 1: "1 finished layer is"}.get(count, f"{count} finished layers are")
    return f"{layers} kept in {output}: go on by the same command with --resume"


def _scales(report: ConversionReport) -> str:
    """What scales are rounded to where those of a source are finer."""
    parts = [spec for formats in report.formats.each for spec in (formats.gate_up, formats.down)]
    dtypes = dict.fromkeys(spec.encoding.scales for spec in parts if spec.encoding.scales is not None)
    return " or ".join(str(dtype).removeprefix("torch.").replace("float", "f") for dtype in dtypes)


def _print(report: ConversionReport) -> None:
    ratio = report.source_bytes / report.packed_bytes
    summary = table(f"{report.output}: experts in {report.formats.name}", "", "input", "output", "ratio")
    summary.add_row("experts", size(report.source_bytes), size(report.packed_bytes), significant(ratio))
    if report.rest_bytes:
        ratio = report.rest_source_bytes / report.rest_bytes
        summary.add_row("rest", size(report.rest_source_bytes), size(report.rest_bytes), significant(ratio))
    if report.linear_errors:
        summary.add_row("of it linear layers", "", size(report.linear_bytes), "")
    console.print(summary)
    accuracy = table("relative error of the weights", "", "mean", "worst", "in layer", "expert")
    for name, e in report.errors.items():
        place = str(e.worst_layer), str(e.worst_expert)
        accuracy.add_row(name, significant(e.mean), significant(e.worst), *place)
    console.print(accuracy)
    if (linear := report.linear_errors) is not None:
        console.print(
            f"{linear.count} linear layers packed too, with a mean error of {significant(linear.mean)}; worst "
            f"{significant(linear.worst)}, {linear.worst_name}.",
            highlight=False,
        )
    if report.kept:
        exact = all(error.worst == 0 for error in report.errors.values())
        kept = "Codes and scales of the experts are the checkpoint's own."
        rounded = f"Codes of the experts are the checkpoint's own, their scales rounded to {_scales(report)}."
        console.print(kept if exact else rounded, highlight=False)
    elif report.own:
        matrices = sum(error.matrices for error in report.errors.values())
        console.print(
            f"[yellow]{report.repacked} of {matrices} matrices have codes that no format holds[/] ({report.odd}): "
            "they are packed anew, and these errors come on top.",
            highlight=False,
        )
    elif report.quantised:
        names = " and ".join(dict.fromkeys(spec.name for spec in report.quantised))
        console.print(
            f"[yellow]The experts were quantised already ({names}), and these errors come on top:[/] without "
            "--quant-method they keep their codes, and the unquantised original makes a better "
            f"{report.formats.name}.",
            highlight=False,
        )
    before = f", {len(report.resumed)} of them before" if report.resumed else ""
    speed = report.read_bytes / report.seconds
    console.print(f"{len(report.layers)} layers{before}; {significant(report.seconds)} s in all, {size(speed)}/s")


def parse_layers(text: str) -> list[int]:
    """[2, 3, 4] of "2-4", [5] of "5". Raises ArgumentError."""
    first, dash, last = text.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) < int(first)):
        raise ArgumentError(f"--layers is {text!r}: expected a number or a range, like 5 or 0-3")
    return list(range(int(first), int(last or first) + 1))
