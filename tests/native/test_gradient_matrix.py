"""Every gradient, wherever two of sizes, routing, formats and adapters meet, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from engine_cases import FORMATS, dequantized, name_of, packed
from gradient_cases import ROUNDED_TOLERANCE, TOLERANCE, gradients, random_batch, random_lora, relative
from gradient_truth import engine_gradients
from pairwise import pairwise
from torch import Tensor

from coterie import ExpertLora, reference

FACTORS = {
    "format": FORMATS,
    "top_k": range(1, 9),
    "rank": (1, 3, 8, 16, 64, 128),
    "tokens": (0, 1, 7, 64, 300),
    "experts": (2, 5, 24, 256),
    "dtype": (torch.bfloat16, torch.float32),
    "a": ("separate", "shared"),
    "routing": ("spread", "one expert"),
}
# Of 256 experts, which are found in one way, whatever their format and the rank of their LoRA, which is small then.
MANY = ("bf16-row", "int4-32", "int4-row-zero", "fp8_block-128")


def allowed(case: dict) -> bool:
    many = case.get("experts") == 256
    if many and (case.get("rank", 1) > 8 or ("format" in case and name_of(case["format"]) not in MANY)):
        return False
    return case.get("top_k", 1) <= case.get("experts", 256)


CASES = pairwise(FACTORS, allowed)


def name(case: dict) -> str:
    sizes = f"E{case['experts']}-K{case['top_k']}-R{case['rank']}-T{case['tokens']}"
    return f"{name_of(case['format'])}-{sizes}-{case['dtype']}-{case['a']}-{case['routing']}".replace("torch.", "")


def stacked(draws: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([draw[key] for draw in draws]) for key in draws[0]}


@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_gradient(case: dict, each_isa: Iterator[str]) -> None:
    """A few tokens' gradient may cancel to almost nothing: four such batches, each by itself, are measured together."""
    sizes = (case["experts"], 128, 128)
    batches = [random_batch(sizes, case["top_k"], case["tokens"], i) for i in range(4 if case["tokens"] < 10 else 1)]
    if case["routing"] == "one expert":
        batches = [(x, torch.where(ids < 0, ids, 1), weights, grad) for x, ids, weights, grad in batches]
    lora = random_lora(sizes, case["rank"], case["dtype"])
    if case["a"] == "shared":
        lora["up_a"] = None
    experts = packed(case["format"], sizes)
    dense = dequantized(case["format"], sizes)
    reached = torch.cat([ids for _, ids, _, _ in batches])
    idle = torch.ones(sizes[0], dtype=torch.bool).index_fill(0, reached[reached >= 0], False)

    def everything(forward, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        return stacked(
            [
                gradients(lambda x, w, a, ids=ids: forward(x, ids, w, a), x, weights, lora, grad, dtype)
                for x, ids, weights, grad in batches
            ]
        )

    if case["tokens"]:
        wanted = everything(
            lambda x, ids, w, adapter: reference.forward(x, ids, w, *dense, lora=adapter), torch.float32
        )
        adapter = ExpertLora(**lora | ({"up_a": lora["gate_a"]} if case["a"] == "shared" else {}), scaling=2.0)
    for isa in each_isa:
        found = everything(lambda x, ids, w, adapter: experts(x, ids, w, lora=adapter))
        assert all(found[key].dtype == case["dtype"] for key in found.keys() & lora.keys())
        if case["tokens"]:
            assert found.keys() == wanted.keys()
            errors = {key: relative(found[key], wanted[key]) for key in found}
            assert max(errors.values()) < TOLERANCE, (isa, errors)
            rounded = stacked([engine_gradients(experts, isa, x, ids, w, adapter, g) for x, ids, w, g in batches])
            errors = {key: relative(found[key], rounded[key].to(found[key].dtype)) for key in found}
            assert max(errors.values()) < ROUNDED_TOLERANCE, (isa, errors)
        assert not any(found[key][:, idle].any() for key in found.keys() & lora.keys()), isa
