"""A layer of packed experts as vLLM's fused experts: its router chooses, the engine computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import (
    FUSED_MOE_UNQUANTIZED_CONFIG,
    FusedMoEConfig,
    FusedMoEQuantConfig,
)

from coterie.errors import ArgumentError, CheckpointError
from coterie.experts import Experts
from coterie.vllm.activation import check_activation
from coterie.vllm.options import Options


class ExpertsMethod(FusedMoEMethodBase):
    """The experts of layer `layer` of the packed checkpoint in `folder`.

    Under expert parallelism a worker computes those that vLLM places on it. Raises ArgumentError for parallelism that
    would cut experts apart, CheckpointError where the layer is broken or another than vLLM's model has.
    """

    def __init__(self, moe: FusedMoEConfig, folder: Path, layer: int, options: Options) -> None:
        super().__init__(moe)
        _check_parallel(moe)
        self.experts = Experts.open(folder, layer, mmap=options.mmap, activations=options.activations)
        self._where = f"{folder}, layer {layer}"

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Checks that the packed experts are the layer's: nothing of it is left to load."""
        experts, moe = self.experts, self.moe
        found = experts.num_experts, experts.hidden_size, experts.intermediate_size, bool(experts.biases())
        expected = moe.num_logical_experts, moe.hidden_dim_unpadded, moe.intermediate_size, moe.has_bias
        if found != expected:
            raise CheckpointError(
                f"{self._where}: experts, hidden and intermediate size, biases are {found}, vLLM's model has {expected}"
            )
        if layer.apply_router_weight_on_input:
            raise ArgumentError(
                f"{self._where}: this model weighs an expert's input, packed experts have their outputs weighed"
            )
        check_activation(self._where, layer, experts.activation, experts.has_gate)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FUSED_MOE_UNQUANTIZED_CONFIG

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x [T,H], weights and ids [T,K] -> [T,H]: under expert parallelism the part of this worker's experts."""
        here = layer.expert_map
        if here is not None:
            topk_ids = torch.where(here[topk_ids] < 0, -1, topk_ids)
        return self.experts(x, topk_ids, topk_weights)


def _check_parallel(moe: FusedMoEConfig) -> None:
    if moe.tp_size > 1:
        raise ArgumentError(
            f"tensor parallelism cuts experts into {moe.tp_size} parts, packed ones stay whole: "
            "add --enable-expert-parallel"
        )
    if moe.dp_size > 1 or moe.pcp_size > 1:
        raise ArgumentError(
            f"data_parallel_size is {moe.dp_size}, prefill_context_parallel_size {moe.pcp_size}: expected 1 with "
            "packed experts; use --tensor-parallel-size with --enable-expert-parallel"
        )
