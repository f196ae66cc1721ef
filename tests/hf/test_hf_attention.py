"""The attention implementation "coterie" beside SDPA."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

import coterie
from coterie import _native, tiny
from coterie.hf.inference import attention

PROMPTS = torch.tensor([[0, 0, 0, 7, 8, 9, 10, 11], [4, 5, 6, 7, 8, 9, 10, 11]])
SEEN = (PROMPTS > 0).long()


def counted(monkeypatch, name: str) -> list:
    """What a function of the engine gives from now on."""
    given, function = [], getattr(_native, name)

    def call(*arguments):
        given.append(function(*arguments))
        return given[-1]

    monkeypatch.setattr(attention._native, name, call)
    return given


@pytest.fixture
def calls(monkeypatch):
    """How often the engine attended."""
    return counted(monkeypatch, "attend")


def opened(**options):
    return coterie.from_pretrained(tiny.PATH, experts="bf16", **options)


def test_a_model_attends_by_the_engine(calls):
    model = opened()
    assert model.config._attn_implementation == attention.NAME
    with torch.inference_mode():
        cache = model(PROMPTS, attention_mask=SEEN).past_key_values
        assert not calls
        more = torch.cat([SEEN, SEEN[:, :1] | 1], 1)
        found = model(PROMPTS[:, -1:], attention_mask=more, past_key_values=cache).logits
    assert len(calls) == model.config.num_hidden_layers and all(out is not None for out in calls)
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        cache = model(PROMPTS, attention_mask=SEEN).past_key_values
        expected = model(PROMPTS[:, -1:], attention_mask=more, past_key_values=cache).logits
    assert len(calls) == model.config.num_hidden_layers
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_prompts_attend_by_the_engine_until_the_model_is_trained(monkeypatch):
    taken = counted(monkeypatch, "attend_prompt")
    monkeypatch.setattr(attention.cpu, "attends_to_prompts", lambda: True)
    model = opened()
    layers = model.config.num_hidden_layers

    def logits(**options) -> torch.Tensor:
        with torch.inference_mode():
            return model(PROMPTS, **options).logits[SEEN.bool()]

    found = [logits(), logits(attention_mask=SEEN)]
    assert len(taken) == 2 * layers and all(out is not None for out in taken)
    model.train()
    model.eval()
    expected = [logits(), logits(attention_mask=SEEN)]
    assert len(taken) == 2 * layers
    # SDPA's rounding may tip a router: float32 says which is right.
    plain = AutoModelForCausalLM.from_pretrained(tiny.PATH, dtype=torch.float32)
    with torch.inference_mode():
        truth = [plain(PROMPTS, **options).logits[SEEN.bool()] for options in ({}, {"attention_mask": SEEN})]
    for one, other in zip(found, truth, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(), expected[0])


def test_an_encoder_is_left_to_sdpa(monkeypatch):
    monkeypatch.setattr(attention._native, "attend_prompt", lambda *_: pytest.fail("the engine was asked"))
    query, key, value = (torch.randn(1, heads, 5, 16).bfloat16() for heads in (4, 2, 2))
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = False, 2
    with torch.no_grad():
        out, _ = attention.attention_forward(module.eval(), query, key, value, None)
        shared = (t.repeat_interleave(2, 1) for t in (key, value))
        expected = torch.nn.functional.scaled_dot_product_attention(query, *shared).transpose(1, 2)
    assert (out - expected).abs().max() < 0.02


def test_generated_tokens_are_those_of_sdpa(float32_products):
    model = opened(dtype=torch.float32)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": SEEN, "pad_token_id": 0}
    found = model.generate(PROMPTS, **options)
    assert torch.equal(found, model.generate(PROMPTS, **options, num_beams=1, use_cache=False))
    model.set_attn_implementation("sdpa")
    assert torch.equal(found, model.generate(PROMPTS, **options))


def test_a_model_with_sinks_of_its_own(checkpoint, calls, float32_products):
    model = coterie.from_pretrained(checkpoint("gpt_oss"), experts="bf16", dtype=torch.float32)
    assert model.config._attn_implementation == attention.NAME_EAGER
    prompt = tiny_models.prompt()
    calls.clear()  # it was tried
    options = {"max_new_tokens": 8, "do_sample": False}
    found = model.generate(prompt, **options)
    assert calls and all(out is not None for out in calls)
    attention.attend_as_before(model)
    assert model.config._attn_implementation == "eager"
    assert torch.equal(found, model.generate(prompt, **options))


def test_attention_that_is_something_else_is_left_alone(checkpoint, monkeypatch):
    from transformers.models.gpt_oss import modeling_gpt_oss

    plain = modeling_gpt_oss.eager_attention_forward

    def capped(module, query, *arguments, **options):
        return plain(module, query.tanh(), *arguments, **options)

    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", capped)
    model = coterie.from_pretrained(checkpoint("gpt_oss"), experts="bf16")
    assert model.config._attn_implementation == "eager"


def test_tokens_that_an_indexer_chose(tmp_path, float32_products):
    """Transformers has them in masks for its own implementations alone; prompts and answers attend to no others."""
    stock = tiny_models.make("glm_moe_dsa", index_topk=4).float()  # weights that are bf16's
    stock.save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, experts="bf16", dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa"
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found, expected = (torch.stack(each.generate(tiny_models.prompt(), **options).logits) for each in (model, stock))
    assert (found - expected).norm() < 0.005 * expected.norm()


def test_gradients_go_through_sdpa(calls):
    model = opened()
    cache = model(PROMPTS[1:]).past_key_values
    x = model.get_input_embeddings()(PROMPTS[1:, -1:]).detach().requires_grad_()
    model(inputs_embeds=x, past_key_values=cache).logits.sum().backward()
    assert not calls and x.grad.any()


def test_an_implementation_that_was_asked_for_stays():
    assert opened(attn_implementation="eager").config._attn_implementation == "eager"


def test_saved_models_ask_for_nothing(tmp_path):
    opened().save_pretrained(tmp_path)
    assert "attn_implementation" not in (tmp_path / "config.json").read_text()


def test_continuous_batching_uses_what_it_knows():
    model = opened()
    manager = model.init_continuous_batching()
    assert model.config._attn_implementation == attention.SDPA
    del manager
