"""Tokens drawn among the likeliest, beside Transformers' own processors over the whole vocabulary."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import coterie
from coterie import tiny
from coterie.hf.inference import sampling

IDS = torch.zeros(1, 3, dtype=torch.int64)
SETTINGS = [
    {"top_k": 20},
    {"top_k": 20, "top_p": 0.95},
    {"top_k": 1},
    {"top_k": 50, "top_p": 0.3, "min_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"top_p": 0.0},
    {"min_p": 0.02},
    {"top_p": 0.8, "min_p": 0.2},
    {"min_p": 0.0},
    {"top_k": 10**6},
    {"temperature": 0.3, "top_k": 40, "top_p": 0.9},
    {"temperature": 2.5, "top_p": 0.99},
]
SCORES = {
    "peaked": lambda random: torch.randn(3, 40_000, generator=random) * 4,
    "flat": lambda random: torch.randn(2, 20_000, generator=random) * 0.01,
    "few": lambda random: torch.randn(2, 11, generator=random),
    "ties": lambda random: (torch.randn(2, 5_000, generator=random) * 2).to(torch.bfloat16).float(),
    "left out before": lambda random: torch.randn(2, 900, generator=random).index_fill(
        1, torch.arange(0, 900, 2), -torch.inf
    ),
}


def warpers(settings) -> LogitsProcessorList:
    kinds = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    return LogitsProcessorList([kind(settings[name]) for name, kind in kinds.items() if name in settings])


def drawn(processors) -> sampling.Drawn:
    config = GenerationConfig(do_sample=True)
    found, greedy = sampling.draw_instead(processors, config, IDS)
    assert config.do_sample and not greedy.do_sample
    return found[-1]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", SCORES)
def test_as_likely_as_in_transformers(kind, settings):
    scores = SCORES[kind](torch.Generator().manual_seed(0))
    processors = warpers(settings)
    expected = processors(IDS, scores.clone()).double().softmax(-1)
    draw, rows = drawn(processors), len(scores)
    options = (torch.full((rows,), value) for value in (draw.top_k, draw.top_p, draw.min_p))
    found, tokens = sampling.candidates(scores / draw.temperature, *options)
    assert all(len(set(row.tolist())) == len(row) for row in tokens)
    found = torch.zeros_like(expected).scatter_(1, tokens, (found / found.sum(-1, keepdim=True)).double())
    if kind == "ties":  # which of equal ones top p leaves out is open
        found, expected = (probabilities.sort(-1).values for probabilities in (found, expected))
    assert (found - expected).abs().max() < 1e-3 * expected.max()
    # Sums in another order move the end of what top p keeps.
    differing = (found > 0) != (expected > 0)
    assert (differing * (found + expected)).sum(-1).max() < (2e-4 if "top_p" in settings else 1e-30)


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.8}, {"min_p": 0.1}, {}], ids=str)
def test_drawn_as_often_as_they_are_likely(settings):
    scores = torch.tensor([2.0, 0.0, -torch.inf, 1.5, -1.0, 1.0, -3.0, 0.5])
    expected = warpers(settings)(IDS, scores[None]).softmax(-1)[0]
    torch.manual_seed(0)
    count = 40_000
    tokens = drawn(warpers(settings))(IDS, scores.expand(count, -1)).argmax(-1)
    found = torch.bincount(tokens, minlength=len(scores)) / count
    assert (found - expected).abs().max() < 0.01 and not found[expected == 0].any()


def test_each_row_by_its_own_options():
    """As requests are that are answered together."""
    count, size = 3_000, 600
    scores = (torch.randn(1, size, generator=torch.Generator().manual_seed(0)) * 2).expand(5 * count, -1)
    rows = [{"top_k": 1}, {"top_k": 3}, {"top_p": 0.6}, {}, {"top_k": 5, "top_p": 0.5}]
    columns = [
        torch.tensor([row.get(name, otherwise) for row in rows]).repeat(count)
        for name, otherwise in (("top_k", size), ("top_p", 1.0), ("min_p", 0.0))
    ]
    torch.manual_seed(0)
    tokens = sampling.draw(scores, *columns).view(count, len(rows))
    for i, row in enumerate(rows):
        expected = warpers(row)(IDS, scores[:1].clone()).softmax(-1)[0]
        found = torch.bincount(tokens[:, i], minlength=size) / count
        assert (found - expected).abs().max() < 0.03 and not found[expected == 0].any()


def test_one_token_is_left():
    scores = torch.randn(5, 1000)
    out = drawn(warpers({"top_k": 5}))(IDS, scores)
    assert out.shape == scores.shape and (out.isfinite().sum(-1) == 1).all()


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.5}], ids=str)
@pytest.mark.parametrize("scores", [torch.full((1, 9), torch.nan), torch.full((1, 9), -torch.inf)], ids=["NaN", "none"])
def test_nothing_is_drawn_of_nothing(settings, scores):
    with pytest.raises(RuntimeError):
        drawn(warpers(settings))(IDS, scores)


@pytest.mark.parametrize(
    ("processors", "config"),
    [
        (warpers({"top_k": 5}), {"do_sample": False}),
        (warpers({"top_k": 5}), {"return_dict_in_generate": True, "output_scores": True}),
        (LogitsProcessorList([TopKLogitsWarper(5, min_tokens_to_keep=2)]), {}),
        (LogitsProcessorList([TopKLogitsWarper(5, filter_value=-1e4)]), {}),
        (LogitsProcessorList([TopPLogitsWarper(0.5), TopKLogitsWarper(5)]), {}),
        (LogitsProcessorList([TopKLogitsWarper(5), TopKLogitsWarper(4)]), {}),
    ],
)
def test_what_is_left_to_transformers(processors, config):
    assert sampling.draw_instead(processors, GenerationConfig(**{"do_sample": True} | config), IDS) is None


@pytest.fixture(scope="module")
def model():
    return coterie.from_pretrained(tiny.PATH, experts="int8")


@pytest.fixture(scope="module")
def prompt():
    return AutoTokenizer.from_pretrained(tiny.PATH)(["An assignment"], return_tensors="pt").input_ids


OPTIONS = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "min_p": 0.01, "max_new_tokens": 12}


@pytest.mark.parametrize("changes", [{}, {"top_k": 0, "top_p": 1.0, "min_p": None}, {"repetition_penalty": 1.3}])
def test_generate(changes, model, prompt, monkeypatch):
    calls, call = [], sampling.Drawn.__call__
    monkeypatch.setattr(sampling.Drawn, "__call__", lambda *given: calls.append(1) or call(*given))
    options = OPTIONS | changes

    def generate(seed):
        torch.manual_seed(seed)
        return model.generate(prompt, num_return_sequences=3, **options)

    first = generate(0)
    assert len(calls) == 12 and first.shape == (3, prompt.shape[1] + 12)
    assert torch.equal(first, generate(0)) and not torch.equal(first, generate(1))
    assert len({tuple(row.tolist()) for row in first}) == 3


def test_top_1_is_greedy_and_scores_are_transformers(model, prompt, monkeypatch):
    greedy = model.generate(prompt, do_sample=False, max_new_tokens=8)
    assert torch.equal(model.generate(prompt, do_sample=True, top_k=1, max_new_tokens=8), greedy)
    monkeypatch.delattr(sampling.Drawn, "__call__")
    out = model.generate(prompt, return_dict_in_generate=True, output_scores=True, **OPTIONS)
    assert (out.scores[0].isfinite().sum(-1) > 1).any()
    model.generate(prompt, num_beams=2, do_sample=True, max_new_tokens=3)
