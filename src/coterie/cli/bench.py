"""coterie bench: speed beside Transformers' own experts, in one process, taking turns."""

from __future__ import annotations

from typing import Annotated

import typer

from coterie.cli import bench_train
from coterie.cli.bench_options import (
    Experts,
    GroupSize,
    Peer,
    Rounds,
    Seconds,
    ZeroPoint,
    describe,
    print_machine,
    read_counts,
)
from coterie.cli.console import console, errors, significant, table

app = typer.Typer(help="Measure speed beside Transformers' own experts.", no_args_is_help=True)
app.add_typer(bench_train.app, name="train")


@app.command()
def layer(
    shape: Annotated[
        str,
        typer.Option(help="tiny, qwen3-30b, mixtral, olmoe, qwen3.5-35b, or free: E=128,H=2048,I=768,K=8."),
    ] = "qwen3-30b",
    experts: Experts = "int4",
    group_size: GroupSize = None,
    zero_point: ZeroPoint = False,
    tokens: Annotated[str, typer.Option("--tokens", "-T", help="Numbers of tokens.")] = "1,16,256,1024",
    peer: Peer = "grouped_mm",
    seconds: Seconds = 0.5,
    rounds: Rounds = 5,
) -> None:
    """Time one layer of experts of random weights."""
    with errors.status("packing random weights"):
        from coterie.bench.layer import bench_layer
        from coterie.bench.shapes import parse_shape

        sizes = parse_shape(shape)
        counts = read_counts("--tokens", tokens)
    report = table(
        f"{describe(sizes)}: {experts}, peer Transformers {peer} bf16",
        "tokens",
        "ms",
        "peer ms",
        "ratio",
        "GB/s",
        "GFLOP/s",
        "error",
        "peer error",
    )
    with errors.status("measuring"):
        for r in bench_layer(sizes, experts, group_size, zero_point, counts, peer, seconds, rounds):
            report.add_row(
                str(r.tokens),
                significant(r.seconds * 1e3),
                significant(r.peer_seconds * 1e3),
                significant(r.ratio),
                significant(r.touched / r.seconds / 1e9),
                significant(r.operations / r.seconds / 1e9),
                significant(r.error),
                significant(r.peer_error),
            )
    console.print(report)
    print_machine(rounds)


@app.command()
def formats(
    shape: Annotated[str, typer.Option(help="As of `bench layer`.")] = "qwen3-30b",
    experts: Annotated[str, typer.Option(help="Formats, or all.")] = "all",
    isa: Annotated[str, typer.Option(help="Instruction sets of this CPU, or all.")] = "all",
    seconds: Seconds = 0.3,
    rounds: Rounds = 5,
) -> None:
    """Time one token in every format and instruction set, as a share of what the memory could deliver."""
    from coterie import cpu
    from coterie.bench.formats import bench_formats
    from coterie.bench.shapes import parse_shape
    from coterie.formats import FORMATS

    sizes = parse_shape(shape)
    names = FORMATS if experts == "all" else experts.split(",")
    isas = cpu.info().isas if isa == "all" else isa.split(",")
    report = table(
        f"{describe(sizes)}, one token: bytes read in the time that it takes / bytes that the memory delivers in it",
        "format",
        "bytes a weight",
        "memory GB/s",
        *isas,
    )
    with errors.status("measuring"):
        for r in bench_formats(sizes, names, isas, seconds, rounds):
            report.add_row(
                r.spec.name,
                significant(r.bytes_per_weight),
                significant(r.bandwidth / 1e9),
                *(f"{share:.0%}" for share in r.share.values()),
            )
    console.print(report)
    print_machine(rounds)


@app.command()
def model(
    experts: Experts = "int4",
    group_size: GroupSize = None,
    zero_point: ZeroPoint = False,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 4,
    vocabulary: Annotated[int, typer.Option(help="Size of its vocabulary.")] = 32768,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    peer: Peer = "grouped_mm",
    seconds: Seconds = 3.0,
    rounds: Rounds = 5,
) -> None:
    """Time prefill and decoding of a model of random weights shaped like Qwen3-30B-A3B, with fewer layers."""
    with errors.status("building and measuring the model (needs about 12 GB of RAM for 4 layers)"):
        from coterie.bench.model import bench_model

        results = bench_model(experts, group_size, zero_point, layers, vocabulary, prompt, peer, seconds, rounds)
    report = table(
        f"{layers} layers of Qwen3-30B-A3B, vocabulary {vocabulary}: {experts}, peer Transformers {peer} bf16",
        "",
        "tokens/s",
        "peer tokens/s",
        "time ratio",
    )
    for r in results:
        report.add_row(
            r.work, significant(r.tokens_per_second), significant(r.peer_tokens_per_second), significant(r.ratio)
        )
    console.print(report)
    print_machine(rounds)
