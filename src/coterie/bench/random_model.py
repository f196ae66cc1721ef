"""A model of random weights, shaped like Qwen3-30B-A3B with fewer layers, with Transformers' experts or packed ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from coterie.errors import ArgumentError
from coterie.experts import Experts
from coterie.formats import Format
from coterie.hf.experts import NAME
from coterie.hf.layout import is_experts, read_layout
from coterie.hf.modules import attach

POOL = 1 << 24  # random values that all large weights are cut from


def qwen3_30b(layers: int, vocabulary: int) -> Qwen3MoeConfig:
    """Qwen3-30B-A3B with another number of layers and size of vocabulary."""
    if layers < 1 or vocabulary < 1:
        raise ArgumentError(f"layers={layers}, vocabulary={vocabulary}: expected both at least 1")
    return Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=vocabulary,
        num_hidden_layers=layers,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )


def random_model(config: Qwen3MoeConfig, implementation: str, spec: Format | None = None) -> Any:
    """The model in bf16 with random weights. Large weights are windows of one pool of random values: quick to fill.

    With `spec` the experts are packed, each layer's as soon as it is filled: the same weights, never whole in bf16.
    """
    model = _on_meta(config, implementation if spec is None else NAME)
    random = torch.Generator().manual_seed(0)
    pool = (torch.randn(POOL, generator=random) * config.initializer_range).bfloat16()
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            weight = module._parameters[name] = torch.nn.Parameter(torch.empty_like(weight, device="cpu"), False)
            if "Norm" in type(module).__name__:
                weight.fill_(1.0)
                continue
            for piece in weight.view(-1).split(POOL // 2):
                start = int(torch.randint(POOL // 2, (1,), generator=random))
                piece.copy_(pool[start : start + piece.numel()])
        if spec is not None and is_experts(module):
            pack(module, module, spec)
    _make_rotary(model)
    return model.eval()


def packed_twin(model: Any, spec: Format) -> Any:
    """The same model with packed experts; everything else it shares with `model`."""
    twin = _on_meta(model.config, NAME)
    for name, module in twin.named_modules():
        source = model.get_submodule(name)
        if is_experts(source):
            pack(module, source, spec)
            continue
        for key in module._parameters:
            module._parameters[key] = source._parameters[key]
    _make_rotary(twin)
    return twin.requires_grad_(False).eval()


def pack(module: Any, source: Any, spec: Format) -> None:
    """Puts packed experts, made of the parameters of `source`, in the place of the parameters of `module`."""
    layout = read_layout(source)
    experts = Experts.empty(
        layout.num_experts,
        layout.hidden_size,
        layout.intermediate_size,
        format=spec,
        activation=layout.activation,
    )
    for e in range(layout.num_experts):
        for name in layout.weights:
            for projection, weight in layout.split_weight(name, getattr(source, name)[e]).items():
                experts.pack_projection(projection, e, weight)
    attach(module, experts, layout)


def _on_meta(config: Qwen3MoeConfig, implementation: str) -> Any:
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    model.set_experts_implementation(implementation)
    return model


def _make_rotary(model: Any) -> None:
    """Rotary frequencies are computed, not loaded: a model from the meta device needs them made."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
