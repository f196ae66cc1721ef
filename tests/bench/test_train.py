"""Training steps that are measured: that both sides compute the same, and that memory follows its law."""

from __future__ import annotations

import torch
from engine_cases import BF16_ACTIVATIONS
from transformers import Qwen3MoeConfig

import coterie
from coterie.bench.random_model import random_model
from coterie.bench.shapes import Shape
from coterie.bench.train_layer import BlockSteps
from coterie.bench.train_memory import bench_train_memory
from coterie.bench.train_model import ModelSteps
from coterie.formats import resolve
from coterie.hf.experts import NAME

CONFIG = Qwen3MoeConfig(
    vocab_size=64,
    num_hidden_layers=2,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=64,
    num_experts=4,
    num_experts_per_tok=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=32,
    initializer_range=0.1,  # experts that matter: without theirs most of the logits would be another
)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def gradients(steps: BlockSteps) -> dict[str, torch.Tensor]:
    steps.prepare(32)
    x = steps.x.detach().to(next(p.dtype for p in steps.model.parameters() if not p.requires_grad)).requires_grad_()
    steps.model(x).backward(steps.grad.to(x.dtype))
    trained = {name: p.grad for name, p in steps.model.named_parameters() if p.requires_grad}
    return {"x": x.grad, **trained}


def test_both_sides_of_a_layer_have_the_same_gradients():
    shape = Shape(E=8, H=128, I=64, K=2)
    ours, theirs = BlockSteps(shape, NAME, resolve("bf16"), 4), BlockSteps(shape, "eager", None, 4)
    assert (ours.frozen, ours.trained) == (theirs.frozen, theirs.trained)
    theirs.model.float()  # exact: what is left are ours, a few bf16 roundings in a row, of 2^-9 each
    found, expected = gradients(ours), gradients(theirs)
    assert list(found) == list(expected) and len(found) == 5
    for name, gradient in expected.items():
        assert relative(found[name], gradient) < 2**-7, name


@torch.inference_mode()
def test_both_sides_of_a_model_compute_the_same():
    """In float32, where Transformers rounds nothing, and coterie its experts' activations on some CPUs, to bf16."""
    theirs, ours = random_model(CONFIG, "eager").float(), random_model(CONFIG, NAME, resolve("bf16")).float()
    ids = torch.arange(48).view(1, -1)
    tolerance = 2**-8 if coterie.cpu.current_isa() in BF16_ACTIVATIONS else 1e-5
    assert relative(ours(ids).logits, theirs(ids).logits) < tolerance


def test_a_step_of_a_model_trains_it():
    steps = ModelSteps(CONFIG, NAME, resolve("int4"), 2)
    trained = [p for p in steps.model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    steps.prepare(16)
    steps.step()
    assert all(p.ne(old).any() for p, old in zip(trained, before, strict=True))
    assert all(p.grad is None for p in trained)


def test_memory_of_a_step_grows_with_tokens_and_not_with_experts():
    shape, tokens = Shape(E=4, H=256, I=256, K=4), (256, 2048)
    results = list(bench_train_memory(shape, (8, 64), tokens=tokens, rank=4))
    few, few_long, many, many_long = results
    assert many.weight.frozen == 8 * few.weight.frozen and many.weight.trained == 8 * few.weight.trained
    for small, large in ((few, many), (few_long, many_long)):
        assert abs(large.rest - small.rest) < 3 << 20
    values = (2048 - 256) * 4 * (2 * 256 + 4)
    assert 2 * values < few_long.rest - few.rest < 12 * values
