"""Requests that Transformers answers together: the tokens of each are those of `generate` alone, in every family."""

from __future__ import annotations

import time

import pytest
import torch
from tiny_models import STRUCTURES, make

import coterie
from coterie.errors import UnsupportedModelError
from coterie.hf.serving.batching import Batches

# Transformers has no pages for the states of linear attention and convolutions, nor for compressed keys and values.
UNBATCHED = {"qwen3_next", "qwen3_5_moe_text", "granitemoehybrid", "nemotron_h", "lfm2_moe", "kimi_linear", "jamba"}
UNBATCHED |= {"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "glm_moe_dsa", "gemma4_text"}
GREEDY = {"temperature": 1.0, "top_k": 1, "top_p": 1.0}
TOKENS = 12


def answers(batches, prompts):
    """The tokens that follow each prompt, in their order."""
    asked = [batches._cb.add_request(ids, max_new_tokens=TOKENS, eos_token_id=-1, **GREEDY) for ids in prompts]
    found = {}
    end = time.monotonic() + 300
    while len(found) < len(asked) and time.monotonic() < end:
        result = batches._cb.get_result(timeout=1)
        if result is not None and result.is_finished():
            assert result.error is None
            found[result.request_id] = result.generated_tokens
    return [found[each] for each in asked]


@pytest.mark.parametrize("family", [*STRUCTURES, *sorted(UNBATCHED - {*STRUCTURES})])
def test_answers_are_those_of_generate(family, tmp_path):
    make(family).save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, experts="bf16", dtype=torch.float32).eval()
    if family in UNBATCHED:
        with pytest.raises(UnsupportedModelError, match="cannot batch its requests"):
            Batches(model, 2048)
        return
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 96, (length,), generator=random).tolist() for length in (5, 17, 30, 1)]
    options = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": -1}
    alone = [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
    batches = Batches(model, 2048)
    try:
        assert answers(batches, prompts) == alone
    finally:
        batches.stop()
