"""KTMoEWrapper: one call that makes the object for a mode and a method."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coterie import cpu
from coterie.kt.buffers import Buffers
from coterie.kt.inference import InferenceExperts
from coterie.kt.methods import find_method
from coterie.kt.options import Options
from coterie.kt.sft import SftExperts


class KTMoEWrapper(Buffers):
    """The experts of one layer: an `InferenceExperts` or, with `mode="sft"`, an `SftExperts`. Names are kt-kernel's.

    A method names the format of the weights; what instructions run is decided by the CPU, and every method works on
    every CPU. FP8 is fp8_block, FP8_PERCHANNEL fp8_channel; AMXINT4, MOE_INT4, RAWINT4 and GPTQ_INT4 are
    int4 in groups of 32, or in the checkpoint's own groups; LLAMAFILE is what a GGUF file has, type by type, and q4_k
    of tensors that are given. Checkpoints are those that `Experts.open` reads.

    Args:
        layer_idx: the layer's number in the model.
        num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size: E, K, H and I.
        gpu_experts_mask: bool [E], True for slots on the GPU: they are never loaded here and add nothing. None: the
            first `num_gpu_experts`, which is none by default.
        cpuinfer_threads: threads of the engine, for the whole process.
        threadpool_count: NUMA sub-pools. The engine splits work and memory among the nodes that the process has.
        weight_path: a checkpoint that `load_weights` reads, or, with `cpu_save`, where a packed one is written.
        chunked_prefill_size: tokens that a training forward may have.
        cpu_save: write what `load_weights_from_tensors` packs.
        max_deferred_experts_per_token: experts of each token that are computed while the next layer begins.
        method: of inference AMXINT4, AMXINT8, RAWINT4, FP8, BF16, FP8_PERCHANNEL, GPTQ_INT4, MXFP4, MXFP8, NVFP4,
            LLAMAFILE, MOE_INT4, MOE_INT8; of sft AMXBF16_SFT, AMXINT8_SFT, AMXINT4_SFT, AMXINT4_1_SFT,
            AMXINT4_KGroup_SFT, AMXINT4_1KGroup_SFT, each with or without _SkipLoRA, AMXFP8_SFT, MXFP4_SFT, INT8_SFT,
            RAWINT4_SFT.
        mode: "inference" or "sft".
        numa_nodes: a node for each sub-pool.
        lora_rank, lora_alpha: R, and the scale of LoRA times R.
        lora_dropout: 0. full_weight_grad: False.
        max_cache_depth: training forwards that may be outstanding.
        group_size: of the KGroup methods: 32, 64, 128, or 0 for rows.
        zero_point: whether the methods with _1 in their names have zero points.
        swiglu_limit, swiglu_alpha: where not 0, the clamp of the activation, and the slope of its sigmoid, with which
            up is shifted by 1.

    Raises ArgumentError, a ValueError, for a value that cannot be had, with the field and the value.
    """

    def __new__(  # type: ignore[misc]
        cls,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        gpu_experts_mask: Tensor | None,
        cpuinfer_threads: int,
        threadpool_count: int,
        weight_path: str | None,
        chunked_prefill_size: int,
        cpu_save: bool = False,
        max_deferred_experts_per_token: int | None = None,
        method: str = "AMXINT4",
        numa_nodes: Sequence[int] | None = None,
        mode: str = "inference",
        num_gpu_experts: int = 0,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        max_cache_depth: int = 1,
        group_size: int = 128,
        zero_point: bool = True,
        full_weight_grad: bool = False,
        swiglu_limit: float = 0.0,
        swiglu_alpha: float = 0.0,
    ) -> InferenceExperts | SftExperts:
        found = find_method(mode, method, group_size, zero_point)
        options = Options(
            layer_idx=layer_idx,
            num_experts=num_experts,
            num_experts_per_tok=num_experts_per_tok,
            hidden_size=hidden_size,
            moe_intermediate_size=moe_intermediate_size,
            gpu_experts_mask=gpu_experts_mask,
            cpuinfer_threads=cpuinfer_threads,
            threadpool_count=threadpool_count,
            weight_path=weight_path,
            chunked_prefill_size=chunked_prefill_size,
            cpu_save=cpu_save,
            max_deferred_experts_per_token=max_deferred_experts_per_token or 0,
            method=found,
            numa_nodes=numa_nodes,
            num_gpu_experts=num_gpu_experts,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            max_cache_depth=max_cache_depth,
            full_weight_grad=full_weight_grad,
            swiglu_limit=swiglu_limit,
            swiglu_alpha=swiglu_alpha,
        )
        if cpu.threads() != cpuinfer_threads:
            cpu.set_threads(cpuinfer_threads)
        return InferenceExperts(options) if mode == "inference" else SftExperts(options)
