"""Greedy decoding with a KV cache, one token a call, for timing."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache

from coterie.hf.inference import cache


class Decoder:
    """Decodes greedily after `prompt` [B, P] int64; after `tokens` tokens it goes back to the end of the prompt."""

    def __init__(self, model: Any, prompt: torch.Tensor, tokens: int = 32):
        self.model, self.prompt, self.tokens = model, prompt, tokens
        self.cache = DynamicCache(config=model.config)
        with torch.inference_mode():
            logits = model(input_ids=prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        self.next = logits[:, -1].argmax(-1, keepdim=True)
        self._after_prompt = None if cache.can_be_cut(self.cache) else copy.deepcopy(self.cache)
        self._decoded = 0

    def __call__(self, number: int = 0) -> None:
        """One token of each sequence."""
        if self._decoded == self.tokens:
            self._decoded = 0
            if self._after_prompt is not None:
                self.cache = copy.deepcopy(self._after_prompt)
            else:
                cache.cut(self.cache, self.tokens)
        self._decoded += 1
        with torch.inference_mode():
            logits = self.model(input_ids=self.next, past_key_values=self.cache, use_cache=True).logits
        self.next = logits[:, -1].argmax(-1, keepdim=True)


class Prefill:
    """One pass over the whole prompt [B, P] int64, from an empty cache."""

    def __init__(self, model: Any, prompt: torch.Tensor):
        self.model, self.prompt = model, prompt

    def __call__(self, number: int = 0) -> None:
        with torch.inference_mode():
            self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1)
