"""The checkpoint that an adapter is merged into, plain or packed: its tensors, and its experts one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from coterie.checkpoints import open_layer, open_reader
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.packed import FILE_NAME
from coterie.checkpoints.tensorfile import DTYPES
from coterie.convert.linears import StoredLinear, stored_linears
from coterie.convert.tensors import CHUNK
from coterie.errors import CheckpointError
from coterie.experts import Experts
from coterie.hf.layout import Layout
from coterie.hf.modules import number_layers, read_layouts
from coterie.hf.names import ExpertNames, expert_names, stored_name, tied_names

Entry = tuple[str, str, tuple[int, ...]]  # name, dtype as in the file, shape
DTYPE_NAMES = {dtype: name for name, (_, dtype) in DTYPES.items() if dtype is not None}


class LayerExperts(Protocol):
    """The experts of a layer; what LayerReader gives."""

    num_experts: int

    def expert(self, expert: int) -> dict[str, Tensor]: ...

    def stored(self, expert: int, weights: dict[str, Tensor]) -> dict[str, Tensor]: ...

    def release(self, expert: int) -> None: ...


@dataclass
class Base:
    """What is read, and what is written.

    rest: the tensors that are merged or copied one by one, each with its shard; layers: the experts that are merged one
    by one, by module name, with the dtype to write, None for the stored one; linears: those of the rest that are
    packed; added: tensors of the merged checkpoint that the base does not store; shards: what each shard of the merged
    checkpoint holds, in order.
    """

    folder: Folder
    rest: dict[str, str]
    shards: dict[str, list[Entry]]
    shard_of: dict[str, str]
    layers: dict[str, tuple[LayerExperts, torch.dtype | None]] = field(default_factory=dict)
    linears: dict[str, StoredLinear] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)

    def entry(self, name: str) -> Entry:
        if (linear := self.linears.get(name)) is not None:
            return name, linear.dtype, linear.shape
        entry = self.folder.file_of(name).entry(name)
        return entry.name, entry.dtype, entry.shape

    def read(self, name: str) -> Tensor:
        """A tensor of the rest; in float32 where it is packed."""
        return self.linears[name].tensor() if name in self.linears else self.folder.tensor(name)

    def chunks(self, name: str) -> Iterator[Tensor]:
        """The bytes of a tensor of the rest, uint8, piece by piece; memory that reading took is let go."""
        if name in self.linears:
            yield from self.linears[name].chunks(self.folder)
            return
        yield from self.folder.file_of(name).bytes(name).split(CHUNK)
        self.folder.release(name)

    def make_room(self, entries: Iterable[Entry], shard: str) -> None:
        for entry in entries:
            self.shards.setdefault(shard, []).append(entry)
            self.shard_of[entry[0]] = shard

    def add(self, name: str, tensor: Tensor, shard: str | None = None) -> None:
        """Adds a tensor to the merged checkpoint, to its last shard where none is given."""
        self.added[name] = tensor
        entry = name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
        self.make_room([entry], shard or next(reversed(self.shards)))


def open_plain(path: Path, layouts: dict[str, Layout], adapted: set[str]) -> Base:
    """A plain checkpoint; the experts modules of `adapted` are merged one expert at a time, the others copied.

    Raises CheckpointError for a checkpoint that is broken or another than its config.json says.
    """
    reader = open_reader(path)
    base = whole(reader.folder, reader.folder.shard_of)
    numbers = number_layers(list(layouts))
    for name in layouts:
        if name not in adapted:
            continue
        layer, layout = reader.layer(numbers[name]), layouts[name]
        quantised = " and ".join(spec.name for spec in layer.kinds if spec is not None)
        if quantised:
            raise CheckpointError(f"{path} is quantised ({quantised}): merge into the original model")
        found = layer.num_experts, layer.hidden_size, layer.intermediate_size, layer.has_gate
        expected = layout.num_experts, layout.hidden_size, layout.intermediate_size, layout.has_gate
        if found != expected:
            raise CheckpointError(
                f"{path}, layer {numbers[name]}: its tensors have (experts, hidden size, intermediate size, gate) "
                f"{found}, its config.json says {expected}"
            )
        base.layers[name] = layer, None
    return base


def open_packed(path: Path, model: PreTrainedModel, layouts: dict[str, Layout]) -> Base:
    """A packed checkpoint, whose experts are dequantised one at a time and named as in the checkpoints of `model`.

    layouts: the experts modules that an adapter sees, in the order of those of `model`. The experts, and packed linear
    layers, are written in the dtype of their parameters in `model`; a packed head that shares its weight with the
    embedding is not written. Raises CheckpointError for a broken checkpoint.
    """
    folder = Folder(path)
    linears = stored_linears(folder, DTYPE_NAMES[model.dtype])
    plain = {name: shard for name, shard in folder.shard_of.items() if not FILE_NAME.fullmatch(shard)}
    base = whole(folder, {name: shard for name, shard in plain.items() if name not in linears})
    tied = tied_names(model)
    base.linears = {name: linear for name, linear in linears.items() if name not in tied}
    for name in base.linears:
        base.rest[name] = f"model-{folder.shard_of[name]}"
        base.make_room([base.entry(name)], base.rest[name])
    numbers = number_layers(list(layouts))
    for (name, layout), (own, _) in zip(layouts.items(), read_layouts(model).items(), strict=True):
        number = numbers[name]
        experts = Experts.from_packed(open_layer(path, number), mmap=True)
        found = experts.num_experts, experts.hidden_size, experts.intermediate_size, experts.has_gate
        if found != (layout.num_experts, layout.hidden_size, layout.intermediate_size, layout.has_gate):
            raise CheckpointError(
                f"{path}, layer {number}: its experts have (experts, hidden size, intermediate size, gate) {found}, "
                "unlike its config.json"
            )
        dtype = model.get_parameter(f"{own}.down_proj").dtype
        layer = PackedExperts(experts, layout, expert_names(model, own, layout))
        base.layers[name] = layer, dtype
        shard = f"model-experts-{number:05d}.safetensors"
        base.make_room(layer.entries(DTYPE_NAMES[dtype]), shard)
        for parameter, bias in layer.biases().items():
            base.add(stored_name(model, f"{own}.{parameter}"), bias.to(dtype), shard)
    return base


def whole(folder: Folder, names: dict[str, str]) -> Base:
    shards: dict[str, list[Entry]] = {}
    for shard in sorted(set(names.values())):
        shards[shard] = [(e.name, e.dtype, e.shape) for e in folder.file(shard).entries.values() if e.name in names]
    return Base(folder, dict(names), shards, dict(names))


class PackedExperts:
    """One layer of a packed checkpoint as a plain one would store it."""

    def __init__(self, experts: Experts, layout: Layout, names: ExpertNames):
        self.num_experts = layout.num_experts
        self._experts, self._layout, self._names = experts, layout, names

    def entries(self, dtype: str) -> Iterator[Entry]:
        layout = self._layout
        for (_, projection), name in self._names.apart.items():
            rows, columns = layout.intermediate_size, layout.hidden_size
            yield name, dtype, (columns, rows) if projection == "down" else (rows, columns)
        for parameter, name in self._names.stacked.items():
            experts, rows, columns = layout.shape(parameter)
            swapped = parameter in self._names.transposed
            yield name, dtype, (experts, columns, rows) if swapped else (experts, rows, columns)

    def expert(self, expert: int) -> dict[str, Tensor]:
        projections = [p for weight in self._layout.weights for p in self._layout.projections_of(weight)]
        return {p: self._experts.dequantize_projection(p, expert) for p in projections}

    def stored(self, expert: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        apart = self._names.apart
        found = {apart[expert, part]: weight for part, weight in weights.items() if (expert, part) in apart}
        for parameter, name in self._names.stacked.items():
            parts = {part: weights[part] for part in self._layout.projections_of(parameter)}
            joined = self._layout.join_weight(parameter, parts)
            found[name] = joined.T if parameter in self._names.transposed else joined
        return found

    def release(self, expert: int) -> None:
        """Nothing: its pages are the file's own."""

    def biases(self) -> dict[str, Tensor]:
        """The parameters that are biases, as the module has them."""
        if not self._layout.has_bias:
            return {}
        found, layout = self._experts.biases(), self._layout
        return {
            name: layout.join_bias(name, {part: found[part] for part in layout.projections_of(name)})
            for name in layout.parameters
            if name.endswith("_bias")
        }
