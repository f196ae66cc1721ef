"""A plain checkpoint with an adapter merged into it, written while it is read: an expert or a tensor is in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear
from torch import Tensor

from coterie.adapters.empty import ADAPTER, PREFIX, lora_key, wrapped_experts
from coterie.checkpoints import LayerReader, open_reader
from coterie.checkpoints.folder import INDEX
from coterie.checkpoints.tensorwriter import TensorWriter, copy_file, write_error
from coterie.convert.rest import CHUNK, other_files
from coterie.errors import CheckpointError
from coterie.hf.layout import is_experts, read_layout
from coterie.hf.modules import number_layers
from coterie.hf.peft import factors, wrappers

Delta = dict[str, tuple[Tensor, Tensor, float]]  # projection -> A [E, R, in], B [E, out, R], scaling


class StreamedMerge:
    """An adapter and the plain checkpoint folder that it is merged into.

    Raises ArgumentError or CheckpointError for a base that is broken or that the adapter does not fit. `possible` is
    False where the adapter changes what is not stored as the model names it, or not by a plain product of A and B.
    """

    def __init__(self, base: Path, adapted: PeftModel, stored: dict[str, Tensor]) -> None:
        self.reader = open_reader(base)
        self.folder = self.reader.folder
        self.experts: dict[int, Delta] = {}
        self.layers: dict[int, LayerReader] = {}
        self.linear: dict[str, tuple[Tensor, Tensor, float]] = {}
        self.replaced: dict[str, Tensor] = {}
        self.parameters = 0
        used = self._find_experts(adapted) | self._find_linear(adapted, stored)
        for key in stored.keys() - used:
            self.replaced[key.removeprefix(PREFIX)] = stored[key]
        changed = {**dict.fromkeys(self.linear), **self.replaced}
        self.possible = all(name in self.folder.shard_of for name in changed) and all(
            self._shape(name) == tensor.shape for name, tensor in self.replaced.items()
        )

    def _shape(self, name: str) -> tuple[int, ...]:
        return self.folder.file_of(name).entry(name).shape

    def _find_experts(self, adapted: PeftModel) -> set[str]:
        model = adapted.base_model.model
        modules = [n.replace(".base_layer", "") for n, m in model.named_modules() if is_experts(m) and is_module(m)]
        numbers = number_layers(list(dict.fromkeys(modules)))
        used = set()
        for name, outer in wrapped_experts(adapted).items():
            layout, number = read_layout(outer.get_base_layer()), numbers[name]
            reader = self.reader.layer(number)
            found = reader.num_experts, reader.hidden_size, reader.intermediate_size, reader.has_gate
            expected = layout.num_experts, layout.hidden_size, layout.intermediate_size, layout.has_gate
            if found != expected:
                raise CheckpointError(
                    f"{self.folder.path}, layer {number}: its tensors have (experts, hidden size, intermediate size, "
                    f"gate) {found}, its config.json says {expected}"
                )
            delta: Delta = {}
            for depth, wrapper in enumerate(wrappers(outer)):
                used |= {lora_key(name, depth, part) for part in "AB"}
                a, b = factors(wrapper, ADAPTER)
                for projection, part in layout.split_lora_b(wrapper.parameter_name, b).items():
                    delta[projection] = a, part, wrapper.scaling[ADAPTER]
                self.parameters += 1
            self.experts[number], self.layers[number] = delta, reader
        return used

    def _find_linear(self, adapted: PeftModel, stored: dict[str, Tensor]) -> set[str]:
        used = set()
        for name, module in adapted.base_model.model.named_modules():
            if type(module) is Linear and not (module.use_dora.get(ADAPTER) or module.lora_bias.get(ADAPTER)):
                keys = [f"{PREFIX}{name}.lora_{part}.weight" for part in "AB"]
                self.linear[f"{name}.weight"] = stored[keys[0]], stored[keys[1]], module.scaling[ADAPTER]
                used |= set(keys)
        return used

    def write(self, output: Path) -> float:
        """Writes the merged checkpoint to a folder; the rounding error of the worst expert's matrix."""
        folder = self.folder
        worst = 0.0
        with ExitStack() as stack:
            writers = {}
            for shard in folder.shards:
                file = folder.file(shard)
                layout = [(entry.name, entry.dtype, entry.shape) for entry in file.entries.values()]
                writers[shard] = stack.enter_context(TensorWriter(output / shard, layout, file.metadata))
            done = set()
            for number, reader in self.layers.items():
                for name, tensor, error in merged_experts(reader, self.experts[number]):
                    done.add(name)
                    writers[folder.shard_of[name]].write(name, tensor)
                    worst = max(worst, error)
            for name, shard in folder.shard_of.items():
                if name in done:
                    continue
                tensor = self._merged(name)
                if tensor is None:
                    for chunk in folder.file_of(name).bytes(name).split(CHUNK):
                        writers[shard].write(name, chunk)
                else:
                    writers[shard].write(name, raw(tensor))
                folder.release(name)
        for name in ("config.json", INDEX, *other_files(folder.root)):
            if (folder.root / name).is_file():
                copy(folder.root / name, output / name)
        return worst

    def _merged(self, name: str) -> Tensor | None:
        """A tensor that is no expert's, as the adapter has it; None where it changes nothing."""
        if name in self.replaced:
            return self.replaced[name].to(self.folder.tensor(name).dtype)
        if name not in self.linear:
            return None
        return merged(self.folder.tensor(name), *self.linear[name])[0]


def is_module(module: torch.nn.Module) -> bool:
    """Whether a module is one of the model's own: PEFT's wrappers show the flags of what they wrap."""
    return not hasattr(module, "base_layer")


def merged_experts(reader: LayerReader, delta: Delta) -> Iterator[tuple[str, Tensor, float]]:
    """(tensor name, the bytes of the next expert's part of it, the expert's worst rounding error)."""
    for e in range(reader.num_experts):
        weights, worst = reader.expert(e), 0.0
        for projection, (a, b, scaling) in delta.items():
            weights[projection], error = merged(weights[projection], a[e], b[e], scaling)
            worst = max(worst, error)
        for name, tensor in reader.stored(e, weights).items():
            yield name, raw(tensor), worst
        reader.release(e)


def merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, float]:
    """(W + scaling * B A in W's dtype, its relative rounding error)."""
    exact = weight.float() + scaling * (b.float() @ a.float())
    rounded = exact.to(weight.dtype)
    return rounded, ((rounded.float() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor: uint8 [nbytes]."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def copy(source: Path, target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(target.parent, error) from error
    copy_file(source, target)
