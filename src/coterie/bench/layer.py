"""One layer of experts beside Transformers' own, on the same random weights and routings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from coterie import reference
from coterie.bench.shapes import Shape
from coterie.bench.timing import take_turns
from coterie.errors import ArgumentError
from coterie.experts import Experts

PEERS = ("grouped_mm", "eager")
OURS = "coterie"
CHECKED = 16  # tokens whose output is compared with float32

Side = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Draw = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x [T, H] bf16, ids [T, K] int64, weights [T, K]


@dataclass(frozen=True, slots=True)
class LayerResult:
    """T tokens through one layer: medians in seconds, errors relative to float32 with the original bf16 weights."""

    tokens: int
    seconds: float
    peer_seconds: float
    ratio: float  # ours / peer, median of the rounds
    touched: float  # packed bytes of the experts that the tokens use, on average
    operations: float  # two per multiply-add
    error: float
    peer_error: float


def bench_layer(
    shape: Shape,
    format: str = "int4",
    group_size: int | None = None,
    zero_point: bool = False,
    tokens: tuple[int, ...] = (1, 16, 256, 1024),
    peer: str = "grouped_mm",
    seconds: float = 0.5,
    rounds: int = 5,
) -> Iterator[LayerResult]:
    """Yields one result per number of tokens. Memory: the bf16 weights once, the packed ones once."""
    check_peer(peer)
    check_tokens(tokens)
    experts = Experts.empty(shape.E, shape.H, shape.I, format=format, group_size=group_size, zero_point=zero_point)
    theirs = transformers_experts(shape, peer)
    for e in range(shape.E):
        for name, weight in zip(("gate", "up", "down"), dense_expert(theirs, e), strict=True):
            experts.pack_projection(name, e, weight)

    sides: dict[str, Side] = {OURS: experts, peer: lambda x, ids, weights: theirs(x, ids, weights.bfloat16())}
    for count in tokens:
        draws = [draw(shape, count, seed) for seed in range(24 if count <= 64 else 6)]
        with torch.inference_mode():
            turns = take_turns({name: _Cycle(side, draws) for name, side in sides.items()}, seconds, rounds)
            x, ids, weights = (part[:CHECKED].contiguous() for part in draws[0])
            truth = float32_output(theirs, x, ids, weights)
            error, peer_error = (relative_error(side(x, ids, weights), truth) for side in sides.values())
        hit = sum(ids.unique().numel() for _, ids, _ in draws) / len(draws)
        yield LayerResult(
            tokens=count,
            seconds=turns.seconds(OURS),
            peer_seconds=turns.seconds(peer),
            ratio=turns.ratio(OURS, peer),
            touched=hit * experts.nbytes / shape.E,
            operations=6.0 * shape.H * shape.I * shape.K * count,
            error=error,
            peer_error=peer_error,
        )


def check_peer(peer: str) -> None:
    if peer not in PEERS:
        raise ArgumentError(f"unknown peer {peer!r}: expected one of {', '.join(PEERS)}")


def check_tokens(tokens: tuple[int, ...]) -> None:
    if not tokens or min(tokens) < 1:
        raise ArgumentError(f"numbers of tokens are {list(tokens)}: expected at least one, all at least 1")


class _Cycle:
    """Calls `side` with one draw after the other."""

    def __init__(self, side: Side, draws: list[Draw]):
        self.side, self.draws = side, draws

    def __call__(self, number: int) -> None:
        self.side(*self.draws[number % len(self.draws)])


def experts_on_meta(shape: Shape, implementation: str) -> Any:
    """Transformers' experts module in bf16, without weights."""
    config = Qwen3MoeConfig(
        num_experts=shape.E, hidden_size=shape.H, moe_intermediate_size=shape.I, num_experts_per_tok=shape.K
    )
    config._experts_implementation = implementation
    with torch.device("meta"):
        return Qwen3MoeExperts(config).to(torch.bfloat16).requires_grad_(False)


def transformers_experts(shape: Shape, implementation: str) -> Any:
    """Transformers' experts in bf16 with Gaussian weights of standard deviation 1 / sqrt(columns)."""
    module = experts_on_meta(shape, implementation).to_empty(device="cpu")
    random = torch.Generator().manual_seed(0)
    for weight in (module.gate_up_proj, module.down_proj):
        for matrix in weight:
            matrix.copy_(torch.randn(matrix.shape, generator=random) / matrix.shape[1] ** 0.5)
    return module


def dense_expert(module: Any, expert: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of gate [I, H], up [I, H] and down [H, I] of one expert of Transformers' module."""
    gate, up = module.gate_up_proj[expert].chunk(2)
    return gate, up, module.down_proj[expert]


def draw(shape: Shape, tokens: int, seed: int) -> Draw:
    """A random input: uniform routing without replacement."""
    random = torch.Generator().manual_seed(1000 * tokens + seed)
    ids = torch.rand(tokens, shape.E, generator=random).topk(shape.K, dim=1).indices.contiguous()
    weights = torch.rand(tokens, shape.K, generator=random) + 0.1
    x = torch.randn(tokens, shape.H, generator=random).bfloat16()
    return x, ids, weights / weights.sum(1, keepdim=True)


def float32_output(module: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The output [T, H] computed in float32 with the module's weights."""
    gate, up = module.gate_up_proj.chunk(2, dim=1)
    return reference.forward(x, ids, weights, gate, up, module.down_proj)


def relative_error(output: torch.Tensor, truth: torch.Tensor) -> float:
    return float((output.float() - truth).norm() / truth.norm())
