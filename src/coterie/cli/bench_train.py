"""coterie bench train: training steps with LoRA, their time and their memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

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
    from coterie.bench.train import TrainResult

app = typer.Typer(help="Measure training steps with LoRA on the experts.", no_args_is_help=True)

ShapeName = Annotated[str, typer.Option("--shape", help="A shape, as in `coterie bench layer`.")]
Tokens = Annotated[str, typer.Option("--tokens", "-T", help="Numbers of tokens of a step.")]
Rank = Annotated[int, typer.Option(help="Rank of LoRA.")]


@app.command()
def layer(
    shape: ShapeName = "olmoe",
    experts: Experts = "int4",
    group_size: GroupSize = None,
    zero_point: ZeroPoint = False,
    tokens: Tokens = "64,512,2048",
    rank: Rank = 16,
    peer: Peer = "grouped_mm",
    seconds: Seconds = 1.0,
    rounds: Rounds = 3,
) -> None:
    """One MoE block, forward and backward, beside PEFT's own target_parameters on Transformers' experts in bf16."""
    with errors.status("making random weights"):
        from coterie.bench.shapes import parse_shape
        from coterie.bench.train_layer import bench_train_layer

        sizes = parse_shape(shape)
        counts = read_counts("--tokens", tokens)
        results = bench_train_layer(sizes, experts, group_size, zero_point, counts, rank, peer, seconds, rounds)
        print_beside(f"{describe(sizes)}: {experts}, LoRA of rank {rank}", peer, results)
    print_machine(rounds)


@app.command()
def model(
    experts: Experts = "int4",
    group_size: GroupSize = None,
    zero_point: ZeroPoint = False,
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = 4,
    vocabulary: Annotated[int, typer.Option(help="Size of its vocabulary.")] = 32768,
    tokens: Tokens = "512",
    rank: Rank = 16,
    peer: Peer = "grouped_mm",
    seconds: Seconds = 1.0,
    rounds: Rounds = 3,
) -> None:
    """A model of random weights shaped like Qwen3-30B-A3B, LoRA on attention and experts, AdamW, beside PEFT's own."""
    with errors.status("building and training the models (needs about 20 GB of RAM for 4 layers)"):
        from coterie.bench.train_model import bench_train_model

        counts = read_counts("--tokens", tokens)
        results = bench_train_model(
            experts, group_size, zero_point, layers, vocabulary, counts, rank, peer, seconds, rounds
        )
        what = f"{layers} layers of Qwen3-30B-A3B, vocabulary {vocabulary}: {experts}, LoRA of rank {rank}"
        print_beside(what, peer, results)
    print_machine(rounds)


@app.command()
def lora(
    shape: ShapeName = "qwen3-30b",
    experts: Experts = "int4",
    group_size: GroupSize = None,
    zero_point: ZeroPoint = False,
    tokens: Tokens = "512,2048",
    rank: Rank = 16,
    seconds: Seconds = 1.0,
    rounds: Rounds = 3,
) -> None:
    """What LoRA adds to a step of one layer: through ExpertLora, and through PEFT's wrappers in PEFT's layout."""
    with errors.status("making random weights"):
        from coterie.bench.shapes import parse_shape
        from coterie.bench.train_lora import bench_train_lora

        sizes = parse_shape(shape)
        counts = read_counts("--tokens", tokens)
        report = table(
            f"{describe(sizes)}: {experts}, time with LoRA of rank {rank} / without",
            "tokens",
            "ms without",
            "ExpertLora",
            "PEFT",
        )
        for r in bench_train_lora(sizes, experts, group_size, zero_point, counts, rank, seconds, rounds):
            report.add_row(str(r.tokens), significant(r.frozen_seconds * 1e3), f"{r.lora:.2f}", f"{r.peft:.2f}")
    console.print(report)
    print_machine(rounds)


@app.command()
def memory(
    shape: ShapeName = "qwen3-30b",
    num_experts: Annotated[str, typer.Option(help="Numbers of experts, in the place of the shape's.")] = "16,64,256",
    experts: Experts = "int4",
    group_size: GroupSize = None,
    zero_point: ZeroPoint = False,
    tokens: Tokens = "512,2048,8192",
    rank: Rank = 16,
) -> None:
    """The memory of a step of one layer: what grows with the experts, and what with the tokens."""
    with errors.status("measuring"):
        from coterie.bench.shapes import parse_shape
        from coterie.bench.train_memory import bench_train_memory

        sizes = parse_shape(shape)
        counts = read_counts("--num-experts", num_experts)
        lengths = read_counts("--tokens", tokens)
        report = table(
            f"H={sizes.H} I={sizes.I} K={sizes.K}: {experts}, LoRA of rank {rank}, peak memory",
            "experts",
            "tokens",
            "weights",
            "LoRA",
            "its gradients",
            "the rest of a step",
            "bytes per T*K*(2I+R)",
        )
        for r in bench_train_memory(sizes, counts, experts, group_size, zero_point, lengths, rank):
            trained = size(r.weight.trained)
            figures = size(r.weight.frozen), trained, trained, size(r.rest), significant(r.per_value)
            report.add_row(str(r.shape.E), str(r.tokens), *figures)
    console.print(report)


def print_beside(what: str, peer: str, results: Iterable[TrainResult]) -> None:
    """A table of our steps beside the peer's."""
    report = table(
        f"{what}, peer PEFT on Transformers {peer} bf16",
        "tokens",
        "ms",
        "peer ms",
        "ratio",
        "weights",
        "peer's",
        "LoRA",
        "peak of a step above these",
        "peer's",
    )
    for r in results:
        report.add_row(
            str(r.tokens),
            significant(r.seconds * 1e3),
            significant(r.peer_seconds * 1e3),
            significant(r.ratio),
            size(r.weight.frozen),
            size(r.peer_weight.frozen),
            size(r.weight.trained),
            size(r.weight.peak),
            size(r.peer_weight.peak),
        )
    console.print(report)
