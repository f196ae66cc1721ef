"""The bundled model is what its training log says."""

from __future__ import annotations

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coterie import tiny


def test_perplexity_is_the_logged_one_and_far_below_a_unigram():
    log = json.loads((tiny.PATH / "training.json").read_text())["heldout_perplexity"]
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    ids = torch.tensor(tokenizer(tiny.heldout_text())["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(tiny.PATH)
    assert abs(tiny.perplexity(model, ids) / log["this model in bf16"] - 1) < 0.01
    assert log["this model in bf16"] < log["unigram"] / 8


def test_it_is_small():
    assert sum(file.stat().st_size for file in tiny.PATH.iterdir()) <= 10_000_000


def test_chat_template_marks_turns():
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    turns = [{"role": "user", "content": "What is a list?"}, {"role": "assistant", "content": "A sequence."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|im_start|>user\nWhat is a list?<|im_end|>\n<|im_start|>assistant\nA sequence.<|im_end|>\n"
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert asked.endswith("<|im_end|>\n<|im_start|>assistant\n")
