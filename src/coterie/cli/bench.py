"""coterie bench: speed beside Transformers' own experts, in one process, taking turns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

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
from coterie.cli.console import console, errors, significant, size, table

if TYPE_CHECKING:
    from coterie.bench.profile import Profile
    from coterie.hf.clock import Part

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
    dense: Annotated[
        str | None, typer.Option(help="Linear layers outside the experts packed too, in this format: int8, ...")
    ] = None,
    like: Annotated[
        str, typer.Option(help="qwen3-30b, or a model's folder, its config.json or a hub id: shapes, not weights.")
    ] = "qwen3-30b",
    layers: Annotated[int, typer.Option(help="The first layers of it.")] = 4,
    vocabulary: Annotated[int | None, typer.Option(help="Another size of vocabulary. [default: its own]")] = None,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 512,
    peer: Annotated[
        str, typer.Option(help="Transformers' implementation to compare with: grouped_mm, eager, or none.")
    ] = "grouped_mm",
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time of a decoded token goes.")] = False,
    seconds: Seconds = 3.0,
    rounds: Rounds = 5,
) -> None:
    """Time prefill and decoding of a model of random weights, shaped like a real one with fewer layers."""
    with errors.status("building the model"):
        from coterie.bench.model import ModelBench

        bench = ModelBench(like, layers, vocabulary, experts, group_size, zero_point, dense, prompt, peer)
    with errors.status("measuring"):
        results = [bench.prefill(seconds, rounds), bench.decode(seconds, rounds)]
    has_peer = results[0].ratio is not None
    console.print(
        f"[bold]{bench.layers} of {bench.whole_layers} layers of {escape(like)}[/], vocabulary {bench.vocabulary}, "
        f"prompt {prompt}: experts {experts}, dense {dense or 'bf16'}",
        highlight=False,
    )
    report = table("", "", "tokens/s", *((f"{peer} bf16 tokens/s", "time ratio") if has_peer else ()))
    for r in results:
        row = [r.tokens_per_second, r.peer_tokens_per_second, r.ratio]
        report.add_row(r.work, *(significant(value) for value in row if value is not None))
    console.print(report)
    if profile:
        with errors.status("profiling"):
            found = bench.profile()
        print_profile(found, bench.whole_layers)
    print_machine(rounds, has_peer)


def print_profile(found: Profile, whole_layers: int) -> None:
    """Where the milliseconds of a decoded token go."""

    def row(name: str, part: Part) -> None:
        least = part.nbytes / found.bandwidth
        times = part.seconds, part.products, least, part.attention, part.rest
        report.add_row(name, *(significant(1e3 * max(0.0, t)) for t in times))

    report = table("ms of a decoded token", "", "all", "products", "at memory speed", "attention", "rest")
    for number, layer in enumerate(found.layers):
        row(f"layer {number}", layer)
    row("head, embedding", found.outside)
    console.print(report)
    console.print(
        f"Products: linear layers and experts; at memory speed: their weights read at {size(found.bandwidth)}/s. "
        f"Rest, {significant(1e3 * found.rest)} ms a layer: norms, routing, positions, the cache, Python. With "
        f"{whole_layers} such layers: {significant(1 / found.seconds_of(whole_layers))} tokens/s.",
        style="dim",
        highlight=False,
    )
