"""The attention implementation "coterie" of Transformers' attention interface: SDPA, and for one token of each sequence
to what is cached, on the CPU, the engine's own, which reads keys and values that query heads share once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from coterie import _native
from coterie.border import runs_now

NAME = "coterie"
SDPA = "sdpa"
CHANGES = ("softcap", "position_bias", "s_aux")  # options that change what attention is


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B, heads, T, D], key and value [B, shared heads, S, D or V] -> [B, T, heads, V]; see the interface."""
    plain = dropout == 0.0 and all(kwargs.get(option) is None for option in CHANGES)
    if plain and query.shape[2] == 1 and query.is_cpu and not torch.is_grad_enabled() and runs_now():
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = _native.attend(query, key, value, attention_mask, scale)
        if out is not None:
            return out, None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)


def attend_here(model: PreTrainedModel) -> None:
    """Has a model that uses SDPA attend by the engine."""
    if model.config._attn_implementation == SDPA:
        model.set_attn_implementation(NAME)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
