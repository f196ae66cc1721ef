"""A checkpoint with an adapter merged into it, written while it is read: an expert or a module is in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from coterie.adapters.base import Base, LayerExperts
from coterie.adapters.empty import ADAPTER, Adapted
from coterie.adapters.modules import changed_parameters, merge_module
from coterie.checkpoints.folder import INDEX
from coterie.checkpoints.tensorfile import DTYPES
from coterie.checkpoints.tensorwriter import TensorWriter, write_text
from coterie.errors import ArgumentError
from coterie.hf.names import parameters_of, stored_name
from coterie.hf.peft import factors, wrappers

Delta = dict[str, tuple[Tensor, Tensor, float]]  # projection -> A [E, R, in], B [E, out, R], scaling


class StreamedMerge:
    """An adapter, and the checkpoint that it is merged into.

    `untied`: the adapter gives the embedding and the output layer, which the base ties, different values, so that both
    are written and config.json must say so. `parameters`: how many of experts are changed. Raises ArgumentError for
    what cannot be merged, CheckpointError for a base that is broken.
    """

    def __init__(self, base: Base, adapted: Adapted) -> None:
        self.base = base
        self.untied = False
        self._adapted = adapted
        self._tied = adapted.plain.all_tied_weights_keys  # parameter -> the one that it shares its values with
        self._tensor_of = parameters_of(adapted.plain, base.rest)
        wrapped = adapted.experts()
        self.parameters = sum(len(list(wrappers(outer))) for outer in wrapped.values())
        self._experts = {name: expert_deltas(adapted, name) if name in wrapped else {} for name in base.layers}
        self._modules = {name: module for name, module in adapted.changed() if name not in wrapped}
        self._changed = {p: name for name, module in self._modules.items() for p in changed_parameters(name, module)}
        for parameter, name in self._changed.items():
            self._check(parameter, name)
        for parameter, other in self._tied.items():
            if parameter in self._changed or other in self._changed:
                self._untie(parameter, other)
        for parameter in self._changed:
            if self._stored(parameter) is None:  # a classifier's head
                dtype = adapted.plain.get_parameter(parameter).dtype
                base.add(stored_name(adapted.plain, parameter), self._value(parameter).to(dtype))

    def write(self, output: Path) -> float:
        """Writes the tensors to a folder, and their index; the rounding error of the worst expert's matrix."""
        base, worst = self.base, 0.0
        done: set[str] = set()
        with ExitStack() as stack:
            writers = {}
            for shard, entries in base.shards.items():
                metadata = base.folder.file(shard).metadata if shard in base.folder.shards else {"format": "pt"}
                writers[shard] = stack.enter_context(TensorWriter(output / shard, entries, metadata))

            def write(name: str, tensor: Tensor) -> None:
                done.add(name)
                writers[base.shard_of[name]].write(name, raw(tensor))

            for name, tensor in base.added.items():
                write(name, tensor)
            for name, (reader, dtype) in base.layers.items():
                for tensor_name, tensor, error in merged_experts(reader, self._experts[name], dtype):
                    write(tensor_name, tensor)
                    worst = max(worst, error)
            for name, module in self._modules.items():
                for parameter, value in merge_module(name, module, self._read).items():
                    if parameter in self._tensor_of and value.device.type != "meta":
                        write(self._tensor_of[parameter], value.to(self._dtype(parameter)))
            for name in base.rest:
                if name not in done:
                    for chunk in base.chunks(name):
                        write(name, chunk)
        if len(base.shards) > 1 or (base.folder.root / INDEX).exists():
            entries = [entry for shard in base.shards.values() for entry in shard]
            total = sum(torch.Size(shape).numel() * DTYPES[dtype][0] // 8 for _, dtype, shape in entries)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(base.shard_of.items()))}
            write_text(output / INDEX, json.dumps(index, indent=2) + "\n")
        return worst

    def _stored(self, parameter: str) -> str | None:
        """The tensor that a parameter is read from; for one that is tied and not stored, that of the other."""
        return self._tensor_of.get(parameter) or self._tensor_of.get(self._tied.get(parameter, ""))

    def _read(self, parameter: str) -> Tensor:
        name = self._stored(parameter)
        assert name is not None  # checked before
        return self.base.read(name)

    def _value(self, parameter: str) -> Tensor:
        """A parameter of the merged model."""
        if parameter not in self._changed:
            return self._read(parameter)
        module = self._changed[parameter]
        return merge_module(module, self._modules[module], self._read)[parameter]

    def _dtype(self, parameter: str) -> torch.dtype:
        """What a parameter is written in."""
        name = self._stored(parameter)
        assert name is not None  # checked before
        dtype = DTYPES[self.base.entry(name)[1]][1]
        assert dtype is not None
        return dtype

    def _check(self, parameter: str, module: str) -> None:
        name = self._stored(parameter)
        if name is None:
            if self._adapted.classifies and "." not in module:
                return
            raise ArgumentError(
                f"{self.base.folder.path} does not store {parameter}, which the adapter changes, as one tensor: such "
                "an adapter cannot be merged"
            )
        found, expected = self.base.entry(name)[2], tuple(self._adapted.plain.get_parameter(parameter).shape)
        if found != expected:
            raise ArgumentError(
                f"the adapter does not fit {self.base.folder.path}: {name} has shape {list(found)}, {module} "
                f"{list(expected)}"
            )

    def _untie(self, parameter: str, other: str) -> None:
        dtype = self._dtype(other)
        value = self._value(parameter).to(dtype)
        if value.device.type == "meta" or torch.equal(value, self._value(other).to(dtype)):
            return
        self.untied = True
        if parameter not in self._tensor_of:
            self.base.add(stored_name(self._adapted.plain, parameter), value)


def expert_deltas(adapted: Adapted, name: str) -> Delta:
    """What the adapter adds to the projections of an experts module."""
    deltas: Delta = {}
    for wrapper in wrappers(adapted.experts()[name]):
        a, b = factors(wrapper, ADAPTER)
        for projection, part in adapted.layouts[name].split_lora_b(wrapper.parameter_name, b).items():
            deltas[projection] = a, part, wrapper.scaling[ADAPTER]
    return deltas


def merged_experts(
    reader: LayerExperts, delta: Delta, dtype: torch.dtype | None
) -> Iterator[tuple[str, Tensor, float]]:
    """(tensor name, the next expert's part of it, the expert's worst rounding error); dtype None: the stored one."""
    for e in range(reader.num_experts):
        weights, worst = reader.expert(e), 0.0
        for projection, weight in weights.items():
            if projection in delta:
                a, b, scaling = delta[projection]
                weights[projection], error = merged(weight, a[e], b[e], scaling, dtype or weight.dtype)
                worst = max(worst, error)
            else:
                weights[projection] = weight.to(dtype or weight.dtype)
        for name, tensor in reader.stored(e, weights).items():
            yield name, tensor, worst
        reader.release(e)


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, float]:
    """(W + scaling * B A in `dtype`, its relative rounding error)."""
    exact = weight.float() + scaling * (b.float() @ a.float())
    rounded = exact.to(dtype)
    return rounded, ((rounded.float() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: uint8 [nbytes]."""
    return tensor.contiguous().view(-1).view(torch.uint8)
