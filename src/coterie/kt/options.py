"""What a layer of experts is made of: the arguments of the factory, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.activations import Activation
from coterie.errors import ArgumentError
from coterie.kt.methods import Method

POSITIVE = (
    "num_experts",
    "num_experts_per_tok",
    "hidden_size",
    "moe_intermediate_size",
    "cpuinfer_threads",
    "threadpool_count",
    "chunked_prefill_size",
    "lora_rank",
    "max_cache_depth",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The arguments of `KTMoEWrapper`, which says what they mean; `method` is found already. Raises ArgumentError."""

    layer_idx: int
    num_experts: int
    num_experts_per_tok: int
    hidden_size: int
    moe_intermediate_size: int
    gpu_experts_mask: Tensor | None
    cpuinfer_threads: int
    threadpool_count: int
    weight_path: str | None
    chunked_prefill_size: int
    cpu_save: bool
    max_deferred_experts_per_token: int
    method: Method
    numa_nodes: Sequence[int] | None
    num_gpu_experts: int
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    max_cache_depth: int
    full_weight_grad: bool
    swiglu_limit: float
    swiglu_alpha: float

    def __post_init__(self) -> None:
        for name in POSITIVE:
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: expected at least 1, found {getattr(self, name)}")
        for name in ("layer_idx", "max_deferred_experts_per_token", "num_gpu_experts"):
            if getattr(self, name) < 0:
                raise ArgumentError(f"{name}: expected at least 0, found {getattr(self, name)}")
        for name in ("num_experts_per_tok", "num_gpu_experts"):
            if getattr(self, name) > self.num_experts:
                raise ArgumentError(
                    f"{name}: expected at most num_experts, which is {self.num_experts}, found {getattr(self, name)}"
                )
        if self.numa_nodes is not None and len(self.numa_nodes) != self.threadpool_count:
            raise ArgumentError(
                f"numa_nodes: expected one node for each of threadpool_count={self.threadpool_count}, found "
                f"{len(self.numa_nodes)}: {list(self.numa_nodes)}"
            )
        mask = self.gpu_experts_mask
        if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != (self.num_experts,)):
            raise ArgumentError(
                f"gpu_experts_mask: expected bool {[self.num_experts]}, found {mask.dtype} {list(mask.shape)}"
            )
        if self.cpu_save and not self.weight_path:
            raise ArgumentError("cpu_save: expected weight_path to name the folder to write to, found none")
        if self.cpu_save and any(self.on_gpu()):
            raise ArgumentError("cpu_save writes whole layers: expected no expert on the GPU, found some in the mask")
        if self.lora_dropout != 0:
            raise ArgumentError(f"lora_dropout: only 0 is supported, found {self.lora_dropout}")
        if self.full_weight_grad:
            raise ArgumentError("full_weight_grad: only False is supported, found True: packed weights are frozen")
        for name in ("swiglu_limit", "swiglu_alpha"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ArgumentError(f"{name}: expected a finite number from 0, found {getattr(self, name)}")

    def on_gpu(self) -> list[bool]:
        """For each slot, whether its expert is on the GPU: the mask, or else the first `num_gpu_experts`."""
        if self.gpu_experts_mask is not None:
            return self.gpu_experts_mask.tolist()
        return [slot < self.num_gpu_experts for slot in range(self.num_experts)]

    def activation(self, stored: Activation) -> Activation:
        """The experts' activation: the checkpoint's, with what `swiglu_limit` and `swiglu_alpha` say of it."""
        given: dict[str, float] = {}
        if self.swiglu_limit:
            given["limit"] = self.swiglu_limit
        if self.swiglu_alpha:
            given |= {"alpha": self.swiglu_alpha, "up_offset": 1.0}
        return replace(stored, **given)  # type: ignore[arg-type]
