"""What the factory makes and what it refuses; masks and batch sizes."""

from __future__ import annotations

import inspect

import pytest
import torch
from kt_cases import E, I, loaded, wrapper

import coterie
from coterie.errors import ArgumentError
from coterie.kt import InferenceExperts, KTMoEWrapper, SftExperts, generate_gpu_experts_masks
from coterie.kt.methods import INFERENCE, SFT

# Of kt-kernel 0.7.2, by inspect.signature.
ARGUMENTS = (
    "layer_idx num_experts num_experts_per_tok hidden_size moe_intermediate_size gpu_experts_mask cpuinfer_threads "
    "threadpool_count weight_path chunked_prefill_size cpu_save max_deferred_experts_per_token method numa_nodes mode "
    "num_gpu_experts lora_rank lora_alpha lora_dropout max_cache_depth group_size zero_point full_weight_grad "
    "swiglu_limit swiglu_alpha"
)
CALLS = {
    InferenceExperts: {
        "load_weights": "physical_to_logical_map_cpu",
        "load_weights_from_tensors": "gate_proj up_proj down_proj physical_to_logical_map_cpu",
        "select_deferred_experts": "expert_ids expert_scores protected_k",
        "submit_forward": "hidden_states topk_ids topk_weights cuda_stream",
        "sync_forward": "hidden_states cuda_stream",
        "forward": "hidden_states topk_ids topk_weights cuda_stream",
    },
    SftExperts: {
        "load_weights": "physical_to_logical_map_cpu",
        "load_weights_from_tensors": "gate_proj up_proj down_proj physical_to_logical_map_cpu",
        "init_lora_weights": " ".join(
            f"{grad}{name}_lora_{ab}" for grad in ("", "grad_") for name in ("gate", "up", "down") for ab in "ab"
        ),
        "forward": "hidden_states expert_ids weights save_for_backward output_device",
        "submit_forward": "hidden_states expert_ids weights save_for_backward",
        "sync_forward": "output_device",
        "submit_backward_async": "grad_output output_device optimizer_grad_scale",
        "sync_backward": "",
        "update_lora_weights": "",
    },
}


def test_arguments_have_the_names_and_the_order_of_kt_kernel():
    assert " ".join(inspect.signature(KTMoEWrapper).parameters) == ARGUMENTS
    for kind, calls in CALLS.items():
        for name, arguments in calls.items():
            assert list(inspect.signature(getattr(kind, name)).parameters)[1:] == arguments.split(), name


@pytest.mark.parametrize("method", INFERENCE)
def test_every_inference_method_packs_its_format(method):
    made = loaded(method=method)
    assert isinstance(made, InferenceExperts) and made.experts.format == INFERENCE[method] and made.method == method


@pytest.mark.parametrize("method", SFT)
def test_every_sft_method_packs_its_format(method):
    made = loaded(method=method, mode="sft", group_size=64)
    grouped, zeros = "KGroup" in method, "_1" in method
    assert isinstance(made, SftExperts) and made.experts.format == SFT[method][0]
    assert made.experts.spec.zero_point == zeros
    if made.experts.format == "int4":
        assert made.experts.spec.group_size == (64 if grouped else 32)


def test_zero_points_can_be_left_out():
    assert not loaded(method="AMXINT4_1KGroup_SFT", mode="sft", group_size=64, zero_point=False).experts.spec.zero_point


def test_modes_and_methods_that_do_not_exist():
    with pytest.raises(ValueError, match="'inference' or 'sft', found 'training'"):
        wrapper(mode="training")
    with pytest.raises(ValueError, match=r"AMXINT4, AMXINT8.*MOE_INT8; found 'AMXBF16_SFT'"):
        wrapper(method="AMXBF16_SFT")
    with pytest.raises(ValueError, match=r"AMXBF16_SFT.*RAWINT4_SFT; found 'AMXINT4'"):
        wrapper(method="AMXINT4", mode="sft")
    with pytest.raises(ValueError, match=r"group_size of int4.*found 48"):
        wrapper(method="AMXINT4_KGroup_SFT", mode="sft", group_size=48)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected at least 1, found 0"),
        ({"hidden_size": -1}, "hidden_size: expected at least 1, found -1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size: .*found 0"),
        ({"cpuinfer_threads": 0}, "cpuinfer_threads: .*found 0"),
        ({"threadpool_count": 0}, "threadpool_count: .*found 0"),
        ({"chunked_prefill_size": 0}, "chunked_prefill_size: .*found 0"),
        ({"lora_rank": 0}, "lora_rank: .*found 0"),
        ({"max_cache_depth": 0}, "max_cache_depth: .*found 0"),
        ({"max_deferred_experts_per_token": -1}, "max_deferred_experts_per_token: .*found -1"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok: expected at most num_experts, which is 8, found 9"),
        ({"numa_nodes": [0, 1]}, r"numa_nodes: .*threadpool_count=1, found 2: \[0, 1\]"),
        ({"gpu_experts_mask": torch.zeros(E + 1, dtype=torch.bool)}, r"gpu_experts_mask: expected bool \[8\], .*\[9\]"),
        ({"gpu_experts_mask": torch.zeros(E)}, "gpu_experts_mask: expected bool .*float32"),
        ({"cpu_save": True}, "cpu_save: expected weight_path"),
        ({"lora_dropout": 0.1}, "lora_dropout: only 0 is supported, found 0.1"),
        ({"full_weight_grad": True}, "full_weight_grad: only False is supported, found True"),
        ({"swiglu_limit": -1.0}, "swiglu_limit: .*found -1.0"),
    ],
)
def test_values_that_cannot_be_had(changed, message):
    with pytest.raises(ValueError, match=message) as raised:
        wrapper(**changed)
    assert isinstance(raised.value, ArgumentError)


def test_threads_are_those_asked_for():
    wrapper(cpuinfer_threads=3, threadpool_count=2, numa_nodes=[0, 1])
    assert coterie.cpu.threads() == 3


def test_the_activation_that_the_arguments_describe():
    assert loaded(swiglu_limit=7.0).experts.activation == coterie.Activation(limit=7.0)
    full = coterie.Activation(alpha=1.702, limit=7.0, up_offset=1.0)
    assert loaded(swiglu_limit=7.0, swiglu_alpha=1.702).experts.activation == full


def test_batch_sizes_are_kept_for_the_process():
    assert KTMoEWrapper.get_capture_batch_sizes() == []
    KTMoEWrapper.set_capture_batch_sizes([1, 8])
    assert wrapper().get_capture_batch_sizes() == [1, 8]
    KTMoEWrapper.get_capture_batch_sizes().append(3)
    assert KTMoEWrapper.get_capture_batch_sizes() == [1, 8]
    with pytest.raises(ValueError, match=r"positive batch sizes, found \[0\]"):
        KTMoEWrapper.set_capture_batch_sizes([0])
    KTMoEWrapper.clear_buffer_cache()
    KTMoEWrapper.clear_sft_buffer_cache()


def test_masks_hold_the_globally_hottest_experts():
    often = torch.tensor([[1.0, 5, 3, 2], [9, 0, 0, 7]])
    expected = {
        0: [[0, 0, 0, 0], [0, 0, 0, 0]],
        1: [[0, 0, 0, 0], [1, 0, 0, 0]],
        3: [[0, 1, 0, 0], [1, 0, 0, 1]],
        5: [[0, 1, 1, 1], [1, 0, 0, 1]],
        9: [[1, 1, 1, 1], [1, 1, 1, 1]],
    }
    for count, rows in expected.items():
        mask = generate_gpu_experts_masks(often, count)
        assert mask.dtype == torch.bool and mask.int().tolist() == rows
    assert generate_gpu_experts_masks(torch.ones(2, 3), 2).int().tolist() == [[1, 1, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match=r"expected \[layers, experts\], found shape \[4\]"):
        generate_gpu_experts_masks(often[0], 1)


def test_sizes_of_weights_are_checked_against_those_of_the_layer():
    with pytest.raises(ValueError, match="moe_intermediate_size: expected 32, found weights of 64"):
        loaded(moe_intermediate_size=I // 2)
