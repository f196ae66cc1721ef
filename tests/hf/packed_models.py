"""What tests ask of packed models."""

from __future__ import annotations

import tiny_models
import torch

from coterie.hf.modules import packed_modules


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(tiny_models.prompt()).logits


def packed_bytes(model) -> dict:
    return {
        (name, expert): module.experts.packed(expert).clone()
        for name, module in packed_modules(model)
        for expert in range(module.experts.num_experts)
    }


def assert_same_bytes(one, other) -> None:
    a, b = packed_bytes(one), packed_bytes(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
