"""A model of random weights, shaped like Qwen3-30B-A3B with fewer layers, beside Transformers' own experts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from coterie.bench.decode import Decoder, Prefill
from coterie.bench.layer import OURS, PEERS
from coterie.bench.timing import take_turns
from coterie.errors import ArgumentError
from coterie.experts import Experts
from coterie.hf.layout import Layout, read_layout
from coterie.hf.modules import attach

POOL = 1 << 24  # random values that all large weights are cut from


@dataclass(frozen=True, slots=True)
class ModelResult:
    """Tokens per second of both, and ours / peer time of the median round (below 1: we are faster)."""

    work: str
    tokens_per_second: float
    peer_tokens_per_second: float
    ratio: float


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


def random_model(config: Qwen3MoeConfig, implementation: str) -> Any:
    """The model in bf16 with random weights. Large weights are windows of one pool of random values: quick to fill."""
    model = _on_meta(config, implementation)
    model.to_empty(device="cpu").requires_grad_(False).eval()
    random = torch.Generator().manual_seed(0)
    pool = (torch.randn(POOL, generator=random) * config.initializer_range).bfloat16()
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            weight.fill_(1.0)
            continue
        for piece in weight.view(-1).split(POOL // 2):
            start = int(torch.randint(POOL // 2, (1,), generator=random))
            piece.copy_(pool[start : start + piece.numel()])
    _make_rotary(model)
    return model


def packed_twin(model: Any, format: str, group_size: int | None = None, zero_point: bool = False) -> Any:
    """The same model with packed experts; everything else it shares with `model`."""
    twin = _on_meta(model.config, OURS)
    for name, module in twin.named_modules():
        source = model.get_submodule(name)
        if isinstance(source, type(model.model.layers[0].mlp.experts)):
            layout = read_layout(module)
            attach(module, _pack(source, layout, format, group_size, zero_point), layout)
            continue
        for key in module._parameters:
            module._parameters[key] = source._parameters[key]
    _make_rotary(twin)
    return twin.requires_grad_(False).eval()


def bench_model(
    format: str = "int4",
    group_size: int | None = None,
    zero_point: bool = False,
    layers: int = 4,
    vocabulary: int = 32768,
    prompt: int = 512,
    peer: str = "grouped_mm",
    seconds: float = 3.0,
    rounds: int = 5,
) -> list[ModelResult]:
    """Prefill of `prompt` tokens and decoding after them, one sequence. Memory: bf16 model + packed experts."""
    if peer not in PEERS:
        raise ArgumentError(f"unknown peer {peer!r}: expected one of {', '.join(PEERS)}")
    if prompt < 1:
        raise ArgumentError(f"prompt={prompt} tokens: expected at least 1")
    theirs = random_model(qwen3_30b(layers, vocabulary), peer)
    models = {OURS: packed_twin(theirs, format, group_size, zero_point), peer: theirs}
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(1))
    prefill = take_turns({name: Prefill(model, ids) for name, model in models.items()}, seconds, rounds)
    decode = take_turns({name: Decoder(model, ids) for name, model in models.items()}, seconds, rounds)
    return [
        ModelResult(work, tokens / turns.seconds(OURS), tokens / turns.seconds(peer), turns.ratio(OURS, peer))
        for work, tokens, turns in (("prefill", prompt, prefill), ("decode", 1, decode))
    ]


def _on_meta(config: Qwen3MoeConfig, implementation: str) -> Any:
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM._from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    model.set_experts_implementation(implementation)
    return model


def _make_rotary(model: Any) -> None:
    """Rotary frequencies are computed, not loaded: a model from the meta device needs them made."""
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)


def _pack(source: Any, layout: Layout, format: str, group_size: int | None, zero_point: bool) -> Experts:
    experts = Experts.empty(
        layout.num_experts,
        layout.hidden_size,
        layout.intermediate_size,
        format=format,
        group_size=group_size,
        zero_point=zero_point,
        activation=layout.activation,
    )
    for e in range(layout.num_experts):
        for name in layout.weights:
            for projection, weight in layout.split_weight(name, getattr(source, name)[e]).items():
                experts.pack_projection(projection, e, weight)
    return experts
