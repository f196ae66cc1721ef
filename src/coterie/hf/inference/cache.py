"""A model's cache of tokens it has seen, passed on from one `generate` to the next."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers.generation.utils import GenerateDecoderOnlyOutput

# What `generate` and its output call it: "cache" since Transformers 5.24.
FIELDS = {field.name for field in dataclasses.fields(GenerateDecoderOnlyOutput)}
NAME = "cache" if "cache" in FIELDS else "past_key_values"


def cut(cache: Any, tokens: int) -> bool:
    """Takes the last tokens out of a cache; False where that cannot be, and nothing is changed."""
    if not can_be_cut(cache):
        return False
    cache.crop(-tokens)
    return True


def can_be_cut(cache: Any) -> bool:
    """Whether tokens can be taken out: each is kept apart, and none fell out of a window that would be in it again."""
    return getattr(cache, "is_croppable", False) and not any(map(_has_forgotten, cache.layers))


def _has_forgotten(layer: Any) -> bool:
    full = getattr(layer, "is_sliding", False) and layer.get_seq_length() >= layer.get_max_length()
    return bool(full) and not getattr(layer, "record_past", False)


def has_room(cache: Any, tokens: int) -> bool:
    """Whether a cache holds so many tokens in all; one that grows does."""
    fixed = [layer for layer in cache.layers if not getattr(layer, "is_sliding", False)]
    return all(getattr(layer, "max_cache_len", tokens) >= tokens for layer in fixed)
