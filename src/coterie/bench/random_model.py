"""A model of random weights, shaped like any that Transformers knows, with Transformers' experts or packed ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import Qwen3MoeConfig

from coterie.errors import ArgumentError
from coterie.experts import Experts
from coterie.formats import Format
from coterie.hf.dense import chosen_linears, pack_linears
from coterie.hf.empty import unfilled_model
from coterie.hf.experts import NAME
from coterie.hf.layout import is_experts, read_layout
from coterie.hf.model import become_packed, compute_here
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


def random_model(config: Any, implementation: str, spec: Format | None = None, dense: Format | None = None) -> Any:
    """The model in bf16 with random weights. Large weights are windows of one pool of random values: quick to fill.

    With `spec` the experts are packed, each layer's as soon as it is filled: the same weights, never whole in bf16.
    With `dense` its linear layers are, too. Then it computes as one that `coterie.from_pretrained` opens.
    """
    model = _unfilled(config, implementation if spec is None else NAME)
    random = torch.Generator().manual_seed(0)
    spread = getattr(config.get_text_config(), "initializer_range", 0.02)
    pool = (torch.randn(POOL, generator=random) * spread).bfloat16()
    for module in model.modules():
        for weight in module._parameters.values():
            if weight is None:
                continue
            if "Norm" in type(module).__name__:
                weight.fill_(1.0)
                continue
            for piece in weight.view(-1).split(POOL // 2):
                start = int(torch.randint(POOL // 2, (1,), generator=random))
                piece.copy_(pool[start : start + piece.numel()])
        if spec is not None and is_experts(module):
            pack(module, module, spec)
    return model if spec is None else _finished(model, dense)


def packed_twin(model: Any, spec: Format, dense: Format | None = None) -> Any:
    """The same model with packed experts and linear layers; everything else it shares with `model`."""
    twin = _unfilled(model.config, NAME)
    for name, module in twin.named_modules():
        source = model.get_submodule(name)
        if is_experts(source):
            pack(module, source, spec)
            continue
        for key in module._parameters:
            module._parameters[key] = source._parameters[key]
    return _finished(twin, dense)


def pack(module: Any, source: Any, spec: Format) -> None:
    """Puts packed experts, made of the parameters of `source`, in the place of the parameters of `module`."""
    layout = read_layout(source)
    experts = Experts.empty(
        layout.num_experts,
        layout.hidden_size,
        layout.intermediate_size,
        format=spec,
        activation=layout.activation,
        has_gate=layout.has_gate,
    )
    biases: dict[str, torch.Tensor] = {}
    for name in layout.parameters:
        if name.endswith("_bias"):
            biases |= layout.split_bias(name, getattr(source, name))
            continue
        for e in range(layout.num_experts):
            for projection, weight in layout.split_weight(name, getattr(source, name)[e]).items():
                experts.pack_projection(projection, e, weight)
    if biases:
        experts.set_biases(**biases)
    attach(module, experts, layout)


def _unfilled(config: Any, implementation: str) -> Any:
    model = unfilled_model(copy.deepcopy(config), dtype=torch.bfloat16)
    model.set_experts_implementation(implementation)
    return model.requires_grad_(False).eval()


def _finished(model: Any, dense: Format | None) -> Any:
    """A model whose experts are packed, as loading leaves it."""
    if dense is not None:
        pack_linears(model, chosen_linears(model, dense, ()), dense, lambda *_: None)
    become_packed(model)
    compute_here(model)
    return model
