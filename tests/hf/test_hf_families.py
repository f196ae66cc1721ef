"""Every supported family against Transformers' own eager experts on the weights that the kernels compute with.

Rounding can tip a router, whose other choice then is another model's; so where whole models are compared, one runs with
the routing that was recorded of the other, and the routers' own choices are compared apart.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import tiny_models
import torch
from engine_cases import BF16_ACTIVATIONS, assert_close, engine_truth
from transformers import AutoModelForCausalLM

import coterie
from coterie.hf.layout import is_experts
from coterie.hf.modules import packed_module, packed_modules

# Relative error of the output: int8 and int4 round activations to int8, bf16 rounds them to bf16, or on some CPUs not.
TOLERANCE = {"bf16": 5e-3, "int8": 2.5e-2, "int4": 2.5e-2}
UNROUNDED = 1e-5
CASES = [(family, experts) for family in tiny_models.FAMILIES for experts in TOLERANCE]
AGREEMENT = 0.9  # of the routers' choices, each from activations that differ by rounding alone
OPTIONS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "output_logits": True}
OPTIONS |= {"return_dict_in_generate": True}

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # hidden [T, H], ids [T, K], weights [T, K]


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


def experts_modules(model) -> list:
    return [module for module in model.modules() if is_experts(module)]


@contextmanager
def recorded(model) -> Iterator[list[list[Call]]]:
    """The calls of each experts module while the block runs."""
    modules = experts_modules(model)
    calls: list[list[Call]] = [[] for _ in modules]
    hooks = [
        module.register_forward_pre_hook(lambda _, args, own=own: own.append(args))
        for module, own in zip(modules, calls, strict=True)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def routed(model, routing: list[tuple[torch.Tensor, torch.Tensor]]) -> Iterator[list[list[Call]]]:
    """Gives each experts module (ids, weights) of `routing` for its last rows; its own choices are recorded."""
    with recorded(model) as calls:
        hooks = []
        for module, (ids, weights) in zip(experts_modules(model), routing, strict=True):

            def replace(_, args, ids=ids, weights=weights):
                hidden, own_ids, own_weights = args
                first = len(own_ids) - len(ids)
                return hidden, torch.cat([own_ids[:first], ids]), torch.cat([own_weights[:first], weights])

            hooks.append(module.register_forward_pre_hook(replace))
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def routed_step_by_step(model, calls: list[list[Call]]) -> Iterator[None]:
    """Gives each call of each experts module the (ids, weights) of the same call in `calls`."""
    hooks = []
    for module, own in zip(experts_modules(model), calls, strict=True):
        steps = iter(own)
        hooks.append(module.register_forward_pre_hook(lambda _, args, steps=steps: (args[0], *next(steps)[1:])))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def routing_of(calls: list[list[Call]], tokens: slice = slice(None)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, weights) of each module, of all its calls one after the other."""
    return [(torch.cat([c[1] for c in own])[tokens], torch.cat([c[2] for c in own])[tokens]) for own in calls]


def agreement(calls: list[list[Call]], routing: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The share of tokens whose experts a module chose as `routing` has them."""
    same = [own[0][1][-len(ids) :].sort()[0] == ids.sort()[0] for own, (ids, _) in zip(calls, routing, strict=True)]
    return torch.stack(same).all(-1).float().mean().item()


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case))
def case(request, checkpoint) -> tuple[Pair, float]:
    family, experts = request.param
    rounds = experts != "bf16" or coterie.cpu.current_isa() in BF16_ACTIVATIONS
    return Pair(checkpoint(family), experts), TOLERANCE[experts] if rounds else UNROUNDED


@torch.inference_mode()
def test_layers_and_logits(case):
    pair, tolerance = case
    prompt = tiny_models.prompt()
    with recorded(pair.eager) as calls:
        expected = pair.eager(prompt).logits
    routing = routing_of(calls)
    with routed(pair.packed, routing) as own:
        found = pair.packed(prompt).logits
    assert relative(found, expected) < tolerance
    assert len(own) == 2 and agreement(own, routing) > AGREEMENT
    isa = coterie.cpu.info().isa
    for module, eager, (args,) in zip(experts_modules(pair.packed), experts_modules(pair.eager), calls, strict=True):
        output, experts = module(*args), packed_module(module).experts
        assert relative(output, eager(*args)) < tolerance
        assert_close(experts.spec, output, engine_truth(experts, isa, *args))


@torch.inference_mode()
def test_greedy_generation(case):
    """Step by step the same logits, and so the same tokens but for near ties, after which the texts may part."""
    pair, tolerance = case
    options, found, expected = {"max_new_tokens": 6, **OPTIONS}, [], []
    for prompt in tiny_models.prompt().split(1):
        with recorded(pair.eager) as calls:
            eager = pair.eager.generate(prompt, **options)
        with routed_step_by_step(pair.packed, calls):
            packed = pair.packed.generate(prompt, **options)
        assert packed.sequences.shape == eager.sequences.shape
        tokens, others = (made.sequences[0, prompt.shape[1] :] for made in (packed, eager))
        assert torch.equal(tokens, torch.cat(packed.logits).argmax(1))
        same = (tokens != others).cumsum(0).eq(0).sum() + 1  # steps after the same text
        found += packed.logits[:same]
        expected += eager.logits[:same]
    assert relative(torch.cat(found), torch.cat(expected)) < tolerance


@torch.inference_mode()
def test_cache(case):
    """Tokens one by one, from the cache, and all at once: the same up to rounding."""
    pair, tolerance = case
    prompt, new = tiny_models.prompt(batch=1), 4
    with recorded(pair.packed) as calls:
        cached = pair.packed.generate(prompt, max_new_tokens=new, **OPTIONS)
    assert torch.equal(cached.sequences[:, :-new], prompt)
    routing = routing_of(calls)
    with routed(pair.packed, routing) as own:
        logits = pair.packed(cached.sequences[:, :-1], use_cache=False).logits
    assert relative(logits[0, -new:], torch.cat(cached.logits)) < tolerance
    assert agreement(own, routing) > AGREEMENT


@torch.inference_mode()
def test_padding(case):
    """A prompt by itself, and padded on the left beside a longer one: the same up to rounding."""
    pair, tolerance = case
    prompt = tiny_models.prompt(batch=1)
    with recorded(pair.packed) as calls:
        alone = pair.packed.generate(prompt, max_new_tokens=1, **OPTIONS)
    batch = torch.cat([tiny_models.prompt(batch=1, length=15), torch.nn.functional.pad(prompt, (3, 0))])
    mask = torch.ones_like(batch)
    mask[1, :3] = 0
    routing = routing_of(calls)
    with routed(pair.packed, routing) as own:
        padded = pair.packed.generate(batch, attention_mask=mask, max_new_tokens=1, **OPTIONS)
    assert relative(padded.logits[0][1], alone.logits[0][0]) < tolerance
    assert agreement(own, routing) > AGREEMENT
