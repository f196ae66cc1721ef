"""torch.compile of models with packed experts and adapters on them: what eager computes, without a graph break."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from lora_models import adapt, loss_and_gradients, packed
from torch import nn
from transformers import AutoModelForCausalLM

BACKEND = "aot_eager"  # traces forward and backward as Inductor does, and leaves the arithmetic to eager's kernels


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.prompt()).logits


def assert_same(found, expected) -> None:
    """Bit for bit, loss and every gradient."""
    assert torch.equal(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], expected[1][name]) for name in found[1])


def test_a_training_step_and_inference(checkpoint):
    model = adapt(packed(checkpoint("gpt_oss")), target_modules=["q_proj"])
    expected, before = loss_and_gradients(model), logits(model)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    found = loss_and_gradients(compiled)
    assert_same((found[0], {name.removeprefix("_orig_mod."): grad for name, grad in found[1].items()}), expected)
    found = logits(compiled)  # whose norms and routers are torch's: sums in another order
    assert (found - before).abs().max() < 1e-5 * before.abs().max()


def layers_of(model: nn.Module) -> nn.ModuleList:
    return next(module for name, module in model.named_modules() if name.endswith("layers"))


def test_layers_share_one_graph(tmp_path):
    """Compiled layer by layer, as deep models are: nothing in a layer's graph is that layer's own."""
    tiny_models.make("qwen3_moe", num_hidden_layers=4).save_pretrained(tmp_path)
    model = adapt(packed(tmp_path), target_modules=["q_proj"])
    model.config.use_cache = False
    model.enable_input_require_grads()  # of the first layer as of the others
    expected = loss_and_gradients(model)
    for layer in layers_of(model):
        layer.compile(backend=BACKEND, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(loss_and_gradients(model), expected)


def test_a_model_that_is_packed_on_first_use(checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(
        checkpoint("qwen3_moe"), experts_implementation="coterie", dtype=torch.float32
    )
    model = adapt(plain, target_modules=["q_proj"])
    forward = model.forward
    model.forward = torch.compile(forward, backend=BACKEND)
    found = loss_and_gradients(model)
    model.forward = forward
    assert_same(found, loss_and_gradients(model))


def test_autocast(checkpoint):
    model = adapt(packed(checkpoint("qwen3_moe")), target_modules=["q_proj"])
    plain = loss_and_gradients(model)
    forward = model.forward
    with torch.autocast("cpu", torch.bfloat16):
        expected = loss_and_gradients(model)
        model.forward = torch.compile(forward, backend=BACKEND, fullgraph=True)
        assert_same(loss_and_gradients(model), expected)
    assert not torch.equal(plain[0], expected[0])
