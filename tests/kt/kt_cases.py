"""Wrappers of small layers of random experts, and batches for them."""

from __future__ import annotations

import torch
from gradient_cases import relative
from torch import Tensor

from coterie.kt import KTMoEWrapper

E, K, H, I, R = 8, 4, 128, 64, 4  # noqa: E741
SCALING = 2.0
IDENTITY = torch.arange(E)


def wrapper(**changed):
    arguments = {
        "layer_idx": 0,
        "num_experts": E,
        "num_experts_per_tok": K,
        "hidden_size": H,
        "moe_intermediate_size": I,
        "gpu_experts_mask": None,
        "cpuinfer_threads": 2,
        "threadpool_count": 1,
        "weight_path": None,
        "chunked_prefill_size": 64,
        "lora_rank": R,
        "lora_alpha": SCALING * R,
    }
    return KTMoEWrapper(**{**arguments, **changed})


def dense(seed: int = 0, experts: int = E) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up [E,I,H] and down [E,H,I], bf16."""
    random = torch.Generator().manual_seed(seed)
    gate, up = torch.randn(2, experts, I, H, generator=random).bfloat16() / H**0.5
    return gate, up, torch.randn(experts, H, I, generator=random).bfloat16() / I**0.5


def loaded(seed: int = 0, slots: Tensor = IDENTITY, **changed):
    made = wrapper(**changed)
    made.load_weights_from_tensors(*dense(seed), slots)
    return made


def batch(tokens: int, draw: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden, ids of different experts in each token, weights."""
    random = torch.Generator().manual_seed(100 * draw + tokens)
    hidden = torch.randn(tokens, H, generator=random).bfloat16()
    ids = torch.rand(tokens, E, generator=random).argsort(1)[:, :K].contiguous()
    return hidden, ids, torch.rand(tokens, K, generator=random) + 0.1


def close(found: Tensor, expected: Tensor, tolerance: float = 0.01) -> None:
    assert relative(found, expected) < tolerance
