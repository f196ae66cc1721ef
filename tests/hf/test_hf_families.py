"""Every supported family against Transformers' own eager experts on the weights that the kernels compute with."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

import coterie
from coterie.hf.layout import is_experts
from coterie.hf.modules import packed_modules

# Relative error of one layer's output: bf16 rounds activations to bf16, int8 and int4 to int8.
TOLERANCE = {"bf16": 5e-3, "int8": 2.5e-2, "int4": 2.5e-2}
CASES = [(family, experts) for family in tiny_models.FAMILIES for experts in TOLERANCE]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.isfinite().all()
    return ((found - expected).norm() / expected.norm()).item()


class Pair:
    """A packed model and Transformers' eager one on the dequantised weights, both f32 but for the experts."""

    def __init__(self, folder, experts: str):
        self.packed = coterie.from_pretrained(folder, experts=experts, dtype=torch.float32)
        self.eager = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager")
        for name, module in packed_modules(self.packed):
            for parameter in module.layout.parameters:
                dense = module.dense(parameter, torch.float32)
                self.eager.get_submodule(name).get_parameter(parameter).data.copy_(dense)


def run(model, prompt: torch.Tensor) -> tuple[torch.Tensor, list[tuple]]:
    """The logits, and (hidden, ids, weights, output) of each experts module."""
    calls: list[tuple] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: calls.append((*args, output)))
        for module in experts_modules(model)
    ]
    logits = model(prompt).logits
    for hook in hooks:
        hook.remove()
    return logits, calls


def experts_modules(model) -> list:
    return [module for module in model.modules() if is_experts(module)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request, checkpoint) -> tuple[Pair, float]:
    family, experts = request.param
    return Pair(checkpoint(family), experts), TOLERANCE[experts]


@torch.inference_mode()
def test_layers_and_logits(case):
    pair, tolerance = case
    prompt = tiny_models.prompt()
    (eager, expected), (packed, found) = run(pair.eager, prompt), run(pair.packed, prompt)
    modules = experts_modules(pair.packed)
    assert len(modules) == len(expected) == len(found) == 2
    for module, (hidden, ids, weights, output) in zip(modules, expected, strict=True):
        assert relative(module(hidden, ids, weights), output) < tolerance
    same = same_routing(expected, found, prompt.shape)
    assert same.float().mean() > 0.4
    assert relative(packed[same], eager[same]) < tolerance


def same_routing(expected: list[tuple], found: list[tuple], shape: tuple[int, int]) -> torch.Tensor:
    """Where [batch, length] routing agreed for a token and all before it: rounding can tip a router's top-k, and its
    weights with it (PhiMoE's jump between 0.5 and 1 where two experts come close)."""
    differs = torch.zeros(shape, dtype=torch.bool)
    for (_, ids, weights, _), (_, other_ids, other_weights, _) in zip(expected, found, strict=True):
        ids, order = ids.sort()
        other_ids, other_order = other_ids.sort()
        apart = (weights.gather(-1, order) - other_weights.gather(-1, other_order)).abs() > 0.1
        differs |= ((ids != other_ids) | apart).any(-1).view(shape)
    return differs.cumsum(-1) == 0


@torch.inference_mode()
def test_greedy_generation(case):
    pair, tolerance = case
    prompt = tiny_models.prompt()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = pair.eager.generate(prompt, **options)
    found = pair.packed.generate(prompt, **options)
    assert found.shape == expected.shape
    for row_found, row_expected in zip(found, expected, strict=True):
        different = (row_found != row_expected).nonzero()
        if len(different):
            # The first token that differs must have been a near tie.
            position = different[0].item()
            logits = pair.eager(row_expected[None, :position]).logits[0, -1]
            gap = logits.max() - logits[row_found[position]]
            assert gap < 4 * tolerance * logits.std()


@torch.inference_mode()
def test_cache_and_padding(case):
    pair, tolerance = case
    prompt = tiny_models.prompt(batch=1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    alone = pair.packed.generate(prompt, **options, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(alone.sequences[:, :-4], prompt)
    uncached = pair.packed.generate(prompt, **options, use_cache=False)
    left = torch.nn.functional.pad(prompt, (3, 0))
    batch = torch.cat([left, tiny_models.prompt(batch=1, length=15)])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    padded = pair.packed.generate(
        batch, attention_mask=mask, **options, output_logits=True, return_dict_in_generate=True
    )
    # Other batch, other shapes: the same computation up to the rounding of activations.
    error = relative(padded.logits[0][0], alone.logits[0][0])
    tipped = not torch.equal(padded.sequences[0, 3:], alone.sequences[0])
    assert error < 2 * tolerance or (tipped and error < 0.5)
    agreement = (uncached == alone.sequences).float().mean()
    assert agreement > 0.9
