"""The attention implementations "coterie" and "coterie_eager" of Transformers' attention interface: by the engine, on
the CPU, without gradients. A token that is decoded reads keys and values that query heads share once, on a GPU too, by
a kernel; prompts are taken in bf16, where experts do not compute as in training. All else is SDPA's or the model's own.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from coterie import _native, cpu
from coterie.border import runs_now
from coterie.gpu import fast
from coterie.hf.inference.latent import are_of_one, made
from coterie.hf.modules import packed_modules

NAME, NAME_EAGER = "coterie", "coterie_eager"
SDPA, EAGER = "sdpa", "eager"
SINKS = "s_aux"
CHANGES = ("softcap", "position_bias")  # options that change what attention is
EXPERTS = "arithmetic_of"  # experts of the model, which copies of it share: they know whether it is as in training
TOLERANCE = 2**-6


def engine_or(otherwise: Callable) -> Callable:
    """An attention function of the interface: the engine's where it takes the tensors, `otherwise` elsewhere.

    query [B, heads, T, D], key and value [B, shared heads, S, D or V] -> [B, T, heads, V].
    """

    def forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        out = _attend(module, query, key, value, attention_mask, dropout, scaling, kwargs)
        if out is not None:
            return out, None
        return otherwise(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)

    return forward


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    options: dict[str, Any],
) -> Tensor | None:
    """What the engine gives; None for what it does not take."""
    if dropout or module.training or torch.is_grad_enabled() or not runs_now():
        return None
    if any(options.get(option) is not None for option in CHANGES):
        return None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not query.is_cpu:
        return _attend_on_gpu(query, key, value, mask, scale, options.get(SINKS))
    if are_of_one(key, value):
        out = key.expansion.attend(query, mask, scale, options.get(SINKS))
        if out is not None or query.shape[2] == 1:
            return out
    if query.shape[2] == 1:
        return _native.attend(query, key, value, mask, scale, options.get(SINKS))
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    experts = getattr(module, EXPERTS, None)
    if (mask is None and not causal) or not cpu.attends_to_prompts() or (experts and experts.as_trained):
        return None
    return _native.attend_prompt(query, made(key), made(value), mask, scale, options.get(SINKS))


def _attend_on_gpu(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, sinks: Tensor | None
) -> Tensor | None:
    """What a kernel gives for a token that is decoded; None for what it does not take."""
    if query.shape[2] != 1 or sinks is not None or not fast.usable(query.device):
        return None
    from coterie.gpu.kernels import token

    return token.attend(query, key, value, mask, scale)


def attend_here(model: PreTrainedModel) -> None:
    """Has a model that uses SDPA, or that SDPA does not serve, attend by the engine. Not where attention itself asks
    which implementation it has: the tokens that an indexer chose are in the mask of Transformers' own alone."""
    if any(hasattr(module, "num_key_value_groups") and _asks(module) for module in model.modules()):
        return
    packed = next((packed for _, packed in packed_modules(model)), None)
    for module in model.modules():
        if packed is not None and hasattr(module, "num_key_value_groups"):
            setattr(module, EXPERTS, packed.experts)
    implementation = model.config._attn_implementation
    if implementation == SDPA:
        model.set_attn_implementation(NAME)
    elif implementation == EAGER and not model._supports_sdpa:
        modules = [module for module in model.modules() if hasattr(module, "num_key_value_groups")]
        if modules and all(map(_is_known, modules)):
            model.set_attn_implementation(NAME_EAGER)


def attend_as_before(model: PreTrainedModel) -> None:
    """Takes `attend_here` back."""
    before = {NAME: SDPA, NAME_EAGER: EAGER}.get(model.config._attn_implementation)
    if before is not None:
        model.set_attn_implementation(before)


def _asks(module: nn.Module) -> bool:
    """Whether the forward of a module's class names SDPA."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and any(one == SDPA or (isinstance(one, tuple) and SDPA in one) for one in code.co_consts)


def own_attention(module: nn.Module, *arguments: Any, **options: Any) -> Any:
    """What Transformers calls for "eager": a mask is added to the scores."""
    return _eager_of(module)(module, *arguments, **options)  # type: ignore[misc]


def _eager_of(module: nn.Module) -> Callable | None:
    """That function, of the file that defines a module; None where it has none."""
    return getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)


def _is_known(module: nn.Module) -> bool:
    """Whether a module's own attention, tried with random numbers, is what the engine computes."""
    eager, sinks, width = _eager_of(module), getattr(module, "sinks", None), getattr(module, "head_dim", 0)
    if eager is None or not width:
        return False
    heads = 2 * module.num_key_value_groups if sinks is None else len(sinks)
    random = torch.Generator().manual_seed(0)
    dtype = next(module.parameters()).dtype
    query = torch.randn(1, heads, 3, width, generator=random).to(dtype)
    key, value = torch.randn(2, 1, heads // module.num_key_value_groups, 5, width, generator=random).to(dtype)
    mask = torch.zeros(1, 1, 3, 5, dtype=dtype)
    mask[..., 1] = mask[..., :2, 4] = torch.finfo(dtype).min
    for tokens, attend in ((1, _native.attend), (3, _native.attend_prompt)):
        given = query[:, :, :tokens], key, value, mask[:, :, :tokens]
        try:
            with torch.no_grad():
                expected = eager(module, *given, scaling=0.5, dropout=0.0, **{SINKS: sinks})[0]
                found = attend(*given, 0.5, sinks)
        except Exception:
            return False
        prompt_of_floats = tokens > 1 and dtype != torch.bfloat16  # which are not the engine's
        if found is None and prompt_of_floats:
            continue
        if found is None or found.shape != expected.shape:
            return False
        if (found - expected).abs().max() >= TOLERANCE * expected.abs().max():
            return False
    return True


attention_forward = engine_or(sdpa_attention_forward)
eager_attention_forward = engine_or(own_attention)

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
AttentionInterface.register(NAME_EAGER, eager_attention_forward)
AttentionMaskInterface.register(NAME_EAGER, eager_mask)
