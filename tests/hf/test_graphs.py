"""Decoding as a graph that is captured and replayed. What captures is pretended, on the CPU; the rest is as it is."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.utils import GenerationMode

import coterie
from coterie.errors import ArgumentError
from coterie.hf.inference import cache as caches
from coterie.hf.inference import graphs
from coterie.hf.inference.graphs import GraphedForward

TOKENS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_moe")
    tiny_models.make("qwen3_moe").save_pretrained(folder)
    return coterie.from_pretrained(folder, "int8", dtype=torch.float32)


@pytest.fixture
def capture(monkeypatch):
    """How often something was captured, how often replayed."""
    counts = {"captured": 0, "replayed": 0}

    def captured(device, call):
        """As a GPU has it: what is captured is not computed, and a replay computes on what lies in the same tensors."""
        held = call.__closure__
        cache = next(c.cell_contents for c in held if isinstance(c.cell_contents, StaticCache))
        before = [layer.cumulative_length.clone() for layer in cache.layers]
        out = call()
        for layer, length in zip(cache.layers, before, strict=True):
            layer.cumulative_length.copy_(length)
        counts["captured"] += 1

        def replay():
            counts["replayed"] += 1
            out.logits.copy_(call().logits)

        out.logits.fill_(float("nan"))
        return replay, out

    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(graphs, "usable", lambda model: True)
    monkeypatch.setattr(graphs, "free_nbytes", lambda device: 1 << 30)
    return counts


@pytest.fixture
def on_gpu(model, monkeypatch):
    """Transformers asks for a compiled forward, as it does where the model is on a GPU."""
    kind = type(model)
    fixed = lambda self, given, settings: graphs.is_fixed(given[caches.NAME]) and not settings.disable_compile  # noqa: E731
    monkeypatch.setattr(kind, "_valid_auto_compile_criteria", fixed)
    return model


def written(model, **options):
    options = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True} | options
    return model.generate(tiny_models.prompt(), output_logits=True, **options)


def test_generate_decodes_as_a_graph(on_gpu, capture):
    expected = written(on_gpu, cache_implementation="dynamic")
    assert not capture["captured"]
    for times in (1, 2):
        found = written(on_gpu)
        assert graphs.is_fixed(found[caches.NAME])
        assert capture == {"captured": times, "replayed": times * (TOKENS - 2)}  # the prompt, and a token before
        assert torch.equal(found.sequences, expected.sequences)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))


def test_a_cache_that_is_passed_on(on_gpu, capture):
    """Part of an answer is taken back, as in a conversation, and another goes on from there."""
    first = written(on_gpu)
    held, kept = first[caches.NAME], first.sequences[:, :-3]
    assert caches.has_room(held, 1024) and not caches.has_room(held, 1025)
    if not caches.cut(held, 3):  # it holds all but the last token; the last that is kept is to be asked for
        pytest.skip("this Transformers does not cut caches of fixed size")
    go_on = {"max_new_tokens": TOKENS, "do_sample": False}
    assert torch.equal(
        on_gpu.generate(kept, **go_on, **{caches.NAME: held}),
        on_gpu.generate(kept, cache_implementation="dynamic", **go_on),
    )
    assert capture["captured"] == 2


def test_what_cannot_be_captured_is_computed(on_gpu, capture, monkeypatch):
    def refuse(device, call):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "captured", refuse)
    expected = written(on_gpu, cache_implementation="dynamic")
    assert torch.equal(written(on_gpu).sequences, expected.sequences)
    assert isinstance(written(on_gpu)[caches.NAME], DynamicCache)  # it is not tried again
    delattr(on_gpu, graphs.REFUSED)


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "dynamic"}, {"disable_compile": True}, {"num_beams": 2}, {"output_hidden_states": True}],
    ids=str,
)
def test_what_is_asked_for_is_done(options, on_gpu, capture):
    assert isinstance(written(on_gpu, **options)[caches.NAME], DynamicCache)
    assert not capture["captured"]


def test_hidden_states_of_each_token(on_gpu, capture):
    """Of a cache of fixed size that is asked for: they are kept, and must not be written over."""
    options = {"output_hidden_states": True, "cache_implementation": "static"}
    found, expected = written(on_gpu, **options), written(on_gpu, output_hidden_states=True)
    for states, true in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(states[-1], true[-1])
    assert not capture["captured"]


def test_whoever_listens_hears_every_token(on_gpu, capture):
    heard = []
    hook = on_gpu.model.layers[0].register_forward_hook(lambda *_: heard.append(1))
    written(on_gpu)
    hook.remove()
    assert len(heard) == TOKENS and not capture["captured"]


def test_a_cache_that_an_answer_does_not_go_into(on_gpu, capture):
    first = written(on_gpu)
    with pytest.raises(ArgumentError, match="fewer than 2000 tokens: generate without it"):
        on_gpu.generate(first.sequences, max_length=2001, **{caches.NAME: first[caches.NAME]})


@pytest.mark.parametrize("change", ["attention", "no such model", "several answers", "training", "refused before"])
def test_a_cache_that_grows(change, model, monkeypatch):
    settings = GenerationConfig(num_return_sequences=4, do_sample=True)
    monkeypatch.setattr(graphs, "usable", lambda model: True)
    monkeypatch.setattr(graphs, "free_nbytes", lambda device: 2 * 4 * 100 * graphs._token_nbytes(model))
    graphs.fix_cache(model, settings, GenerationMode.SAMPLE, 1, 100)
    assert settings.cache_implementation == "static"
    settings, tokens = GenerationConfig(num_return_sequences=4, do_sample=True), 100
    if change == "attention":
        monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    elif change == "no such model":
        monkeypatch.setattr(graphs, "_token_nbytes", lambda model: 1 / 0)
    elif change == "several answers":
        tokens = 101
    elif change == "training":
        monkeypatch.setattr(model, "training", True)
    else:
        monkeypatch.setattr(model, graphs.REFUSED, True, raising=False)
    graphs.fix_cache(model, settings, GenerationMode.SAMPLE, 1, tokens)
    assert settings.cache_implementation is None


def test_a_cache_that_has_no_room_grows(model, monkeypatch):
    monkeypatch.setattr(graphs, "usable", lambda model: True)
    token = graphs._token_nbytes(model)
    for room, length in ((2048, 2048), (2047, 1025), (1025, 1025), (1024, None)):
        monkeypatch.setattr(graphs, "free_nbytes", lambda device, room=room: 2 * 3 * room * token)
        settings = GenerationConfig()
        graphs.fix_cache(model, settings, GenerationMode.SAMPLE, 3, 1025)
        assert (settings.cache_implementation, settings.max_cache_len) == (length and "static", length)


def test_layers_that_count_in_python_are_computed(model, capture):
    """A sliding window's layer keeps its length outside of tensors, where no graph moves it on."""
    from transformers.cache_utils import StaticSlidingWindowLayer

    held = StaticCache(config=model.config, max_cache_len=32)
    assert graphs.is_fixed(held) and not graphs.is_fixed(DynamicCache())
    held.layers = [StaticSlidingWindowLayer(max_cache_len=32, sliding_window=32) for _ in held.layers]
    assert not graphs.is_fixed(held)
    forward, ids = GraphedForward(model), torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(4):
            forward(input_ids=ids, **{caches.NAME: held})
    assert not capture["captured"]


def test_new_shapes_are_captured_anew_and_gradients_never(model, capture):
    held, forward = StaticCache(config=model.config, max_cache_len=32), GraphedForward(model)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            for tokens in (1, 1, 1, 2, 2):
                ids = torch.zeros(1, tokens, dtype=torch.int64)
                out = forward(input_ids=ids, use_cache=True, **{caches.NAME: held})
                assert out.logits.shape[:2] == (1, tokens) and out.logits.requires_grad == gradients
        assert capture["captured"] == (0 if gradients else 2)
