"""Packed linear layers as vLLM's: those that it merges (q, k and v, gate and up) one beside the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from coterie.checkpoints.packed_linears import LINEARS_FILE, LinearsFile, open_linears
from coterie.errors import CheckpointError
from coterie.linear import Linear
from coterie.vllm.options import Options

Stored = tuple[str, LinearsFile]  # a weight's name in the checkpoint, and its file


class PackedNames:
    """The packed linear layers of a checkpoint, by the names of vLLM's modules."""

    def __init__(self, folder: Path) -> None:
        """Raises CheckpointError where a file of packed linear layers is broken."""
        files = [file for file in sorted(folder.iterdir()) if LINEARS_FILE.fullmatch(file.name)]
        self._stored: dict[str, Stored] = {name: (name, file) for name, file in open_linears(files).items()}

    def rename(self, mapper: WeightsMapper) -> None:
        """From the names in the checkpoint to those of vLLM's modules."""
        self._stored = mapper.apply_dict(self._stored)

    def of(self, prefix: str, merged: Mapping[str, Sequence[str]]) -> list[Stored]:
        """The packed weights that make up the module `prefix`, in order; none where it is not packed.

        `merged`: by the name of a module that vLLM merges, what it is merged from. Raises CheckpointError where only
        some of those are packed.
        """
        if f"{prefix}.weight" in self._stored:
            return [self._stored[f"{prefix}.weight"]]
        parent, _, name = prefix.rpartition(".")
        parts = [f"{parent}.{part}.weight" for part in merged.get(name, ())]
        packed = [part for part in parts if part in self._stored]
        if len(packed) not in (0, len(parts)):
            left = [part for part in parts if part not in self._stored]
            raise CheckpointError(
                f"{prefix}: vLLM merges it from {', '.join(parts)}, of which {', '.join(left)} is not packed: "
                "convert the original with a dense_skip that leaves out all of them or none"
            )
        return [self._stored[part] for part in packed]


class LinearMethod(LinearMethodBase):
    """A linear layer, or several that vLLM merges into one, whose weights are packed."""

    def __init__(self, prefix: str, stored: Sequence[Stored], options: Options) -> None:
        self._prefix = prefix
        self.linears = [Linear.from_packed(file, name, mmap=options.mmap) for name, file in stored]

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Checks the packed shapes; the weight that vLLM's loader finds here is empty, and stays so.

        Raises CheckpointError where the layer has another shape, or is cut into parts by tensor parallelism.
        """
        rows = output_partition_sizes if len(self.linears) > 1 else [sum(output_partition_sizes)]
        if isinstance(layer, ParallelLMHead):  # vLLM pads the vocabulary
            rows = [min(layer.org_vocab_size, rows[0])]
        expected = [(out, input_size_per_partition) for out in rows]
        found = [(linear.out_features, linear.in_features) for linear in self.linears]
        if found != expected:
            raise CheckpointError(
                f"{self._prefix}: packed as {found} (rows, columns), this worker of vLLM has {expected}; packed linear "
                "layers are not cut into parts: leave out --tensor-parallel-size, or convert with --dense none"
            )
        weight = nn.Parameter(torch.empty(0, dtype=params_dtype), requires_grad=False)
        weight.weight_loader = self._skip  # type: ignore[attr-defined]
        layer.register_parameter("weight", weight)

    def _skip(self, parameter: Tensor, loaded: Tensor, *shard: Any) -> None:
        if loaded.dtype != torch.uint8:
            raise CheckpointError(
                f"{self._prefix}: found a weight of {loaded.dtype} beside the packed one: convert the original again"
            )

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """A packed head has a weight of its own."""
        return layer

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., in] -> [..., out], bias added."""
        parts = [linear(x) for linear in self.linears]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return out if bias is None else out + bias
