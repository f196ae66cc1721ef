"""Speculation of Transformers' own on packed models: drafts from the prompt or from a smaller model, verified several
at a time, give the tokens that greedy decoding gives."""

from __future__ import annotations

import pytest
import torch
from tiny_models import make
from transformers import AutoTokenizer

import coterie
from coterie import tiny

FAMILIES = ["qwen3_moe", "gpt_oss", "glm4_moe", "deepseek_v3"]  # those with linear attention Transformers refuses
GREEDY = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None, "pad_token_id": 0}


def verified(model, monkeypatch) -> list[int]:
    """How many tokens each forward of a model takes."""
    tokens, forward = [], type(model).forward

    def counted(self, *args, **kwargs):
        ids = args[0] if args else kwargs["input_ids"]
        if self is model:
            tokens.append(ids.shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("by", ["prompt", "assistant"])
def test_families(family, by, tmp_path, float32_products, monkeypatch):
    make(family).save_pretrained(tmp_path / "model")
    model = coterie.from_pretrained(tmp_path / "model", experts="bf16", dense="bf16", dtype=torch.float32).eval()
    ids = torch.randint(3, 96, (1, 7), generator=torch.Generator().manual_seed(0)).repeat(1, 3)
    expected = model.generate(ids, **GREEDY)
    if by == "prompt":
        options = {"prompt_lookup_num_tokens": 4}
    else:
        options = {"assistant_model": coterie.from_pretrained(tmp_path / "model", experts="int8", dtype=torch.float32)}
    tokens = verified(model, monkeypatch)
    assert torch.equal(model.generate(ids, **options, **GREEDY), expected)
    assert any(1 < count < ids.shape[1] for count in tokens)


def test_drafts_that_are_taken_save_forwards(monkeypatch):
    model = coterie.from_pretrained(tiny.PATH, experts="int8", dense="int8")
    draft = coterie.from_pretrained(tiny.PATH, experts="int4", dense="int4")
    ids = AutoTokenizer.from_pretrained(tiny.PATH)("An assignment statement", return_tensors="pt").input_ids
    tokens = verified(model, monkeypatch)
    out = model.generate(ids, assistant_model=draft, **GREEDY)
    assert out.shape[1] == ids.shape[1] + 24 and len(tokens) < 20


def test_sampling_with_an_assistant():
    model = coterie.from_pretrained(tiny.PATH, experts="int8")
    ids = AutoTokenizer.from_pretrained(tiny.PATH)("An assignment statement", return_tensors="pt").input_ids
    torch.manual_seed(0)
    options = GREEDY | {"do_sample": True, "top_k": 20, "top_p": 0.9}
    out = model.generate(ids, prompt_lookup_num_tokens=3, **options)
    assert out.shape[1] == ids.shape[1] + 24
