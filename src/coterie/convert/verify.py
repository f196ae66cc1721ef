"""A packed checkpoint against its source: how far its weights are from it, and what its experts compute."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from coterie.checkpoints import Codes, LayerReader, open_layer, packed
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.packed import packed_layers
from coterie.checkpoints.reader import spans
from coterie.convert.compare import apart
from coterie.convert.linears import stored_linears
from coterie.convert.progress import Meter, Progress
from coterie.convert.report import LinearErrors, ProjectionError
from coterie.convert.source import open_source, rest_of
from coterie.convert.tensors import written_tensors
from coterie.errors import ArgumentError, CheckpointError
from coterie.experts import Experts
from coterie.layer import PROJECTIONS
from coterie.reference import forward

Batch = tuple[Tensor, Tensor, Tensor]  # x [T,H], ids [T,K], weights [T,K]


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """A layer's relative errors: ||W - packed|| / ||W|| by projection, and of the output on random tokens."""

    layer: int
    errors: dict[str, ProjectionError]
    output_error: float

    @property
    def worst(self) -> float:
        return max(self.output_error, *(error.worst for error in self.errors.values()))


def verify(
    path: str | os.PathLike,
    source: str | os.PathLike,
    layers: Sequence[int] | None = None,
    tokens: int = 16,
    progress: Progress | None = None,
) -> list[LayerCheck]:
    """Compares each layer of the packed checkpoint folder `path` with the checkpoint that it was packed from.

    Every matrix is compared, an expert at a time; packed weights are used where they lie. Outputs are compared for
    `tokens` random tokens, each with as many random experts as the model chooses, with those of `source` in float32;
    the packed ones compute with bf16 activations, so that the error is that of their weights. `layers` None:
    all. Raises ArgumentError for layers that one of them lacks, CheckpointError for other sizes.
    """
    path, source = Path(path), Path(source)
    if not packed(path) or not path.is_dir():
        raise ArgumentError(f"{path} is no folder of packed layers: expected what `coterie convert cpu` wrote")
    if tokens < 1:
        raise ArgumentError(f"--tokens is {tokens}: expected at least 1")
    reader = open_source(source)
    both = set(reader.layers) & set(packed_layers(path))
    chosen = sorted(set(reader.layers) if layers is None else set(layers))
    missing = [layer for layer in chosen if layer not in both]
    if missing or not chosen:
        raise ArgumentError(
            f"layers {spans(tuple(missing))} are not in both {path} and {source}; those that are: "
            f"{spans(tuple(sorted(both))) or 'none'}"
        )
    readers = {layer: reader.layer(layer) for layer in chosen}
    meter, checks = Meter(progress, len(readers), sum(r.nbytes for r in readers.values())), []
    for part, (layer, r) in enumerate(readers.items(), 1):
        file = open_layer(path, layer)
        experts = Experts.from_packed(file, mmap=True)
        experts.activations = "bf16"
        _check_sizes(str(file.file.path), experts, r)
        batch = _tokens(tokens, r, reader.experts_per_token or 8, layer)
        checks.append(_check_layer(layer, r, experts, batch, partial(meter.add, part, r.num_experts)))
    return checks


def verify_linears(path: Path, source: Path, tied: Mapping[str, str], rest: Path | None = None) -> LinearErrors:
    """The relative errors of the packed linear layers of the checkpoint folder `path`, none where it has none.

    tied: tensors that `source` need not have, since they are those of other names. rest: as of `convert_cpu`. Raises
    CheckpointError for a tensor that it has not, or of another shape.
    """
    folder, errors = Folder(path), LinearErrors()
    linears = stored_linears(folder, "F32")
    if not linears:
        return errors
    reader = open_source(source)
    original = rest_of(source, reader, rest)
    experts = {name for layer in reader.layers for name in reader.layer(layer).tensors}
    names = [name for name in original.shard_of if name not in experts]
    tensors = {tensor.name: tensor for tensor in written_tensors(original, names, reader.schemes)}
    for name, linear in linears.items():
        expected = tensors.get(name) or tensors.get(tied.get(name, ""))
        if expected is None or expected.shape != linear.shape:
            found = f"its shape is {list(expected.shape)}" if expected else "it has no such tensor"
            raise CheckpointError(f"{source}, tensor {name}: expected {list(linear.shape)}, {found}")
        errors.add(name, apart(original, expected, folder, linear)[1])
    return errors


def _check_layer(
    layer: int, reader: LayerReader, experts: Experts, batch: Batch, told: Callable[[int, int], None]
) -> LayerCheck:
    """`told` hears of each expert, and of its bytes."""
    x, ids, weights = batch
    biases, errors, expected = reader.biases(), dict[str, ProjectionError](), torch.zeros_like(x)
    for e in range(reader.num_experts):
        dense = {name: _dense(weight) for name, weight in reader.expert(e).items()}
        for name, weight in dense.items():
            found = experts.dequantize_projection(name, e)
            errors.setdefault(name, ProjectionError()).add(layer, e, _apart(weight, found))
        gate, up, down = (dense[name][None] if name in dense else None for name in PROJECTIONS)
        b_gate, b_up, b_down = (biases[name][e : e + 1] if name in biases else None for name in PROJECTIONS)
        assert up is not None and down is not None
        of_it = torch.where(ids == e, 0, -1)
        expected += forward(x, of_it, weights, gate, up, down, reader.activation, b_gate, b_up, b_down)
        reader.release(e)
        told(e + 1, reader.nbytes // reader.num_experts)
    with torch.no_grad():
        return LayerCheck(layer, errors, _apart(expected, experts(x, ids, weights)))


def _dense(weight: Tensor | Codes) -> Tensor:
    return weight.dequantize() if isinstance(weight, Codes) else weight.float()


def _apart(expected: Tensor, found: Tensor) -> float:
    """||expected - found|| / ||expected||; NaN anywhere is inf."""
    error = ((expected - found).norm() / expected.norm().clamp(min=1e-30)).item()
    return error if error == error else float("inf")


def _tokens(count: int, reader: LayerReader, per_token: int, seed: int) -> Batch:
    """x [T,H] that bf16 holds, ids [T,K] without duplicates, weights [T,K] that add up to 1."""
    random = torch.Generator().manual_seed(seed)
    chosen = min(max(1, per_token), reader.num_experts)
    x = torch.randn(count, reader.hidden_size, generator=random).bfloat16().float()
    scores = torch.rand(count, reader.num_experts, generator=random)
    best, ids = scores.topk(chosen)
    return x, ids, best.softmax(-1)


def _check_sizes(file: str, experts: Experts, reader: LayerReader) -> None:
    """Raises CheckpointError unless packed experts are of the source's sizes and kind."""
    for part in ("num_experts", "hidden_size", "intermediate_size", "has_gate", "activation"):
        found, expected = getattr(experts, part), getattr(reader, part)
        if found != expected:
            raise CheckpointError(f"{file}: {part} is {found}, that of the source is {expected}")
