"""What a model is made of, as far as it takes memory and time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from coterie.checkpoints.packed_formats import ModelFormats
from coterie.errors import ArgumentError
from coterie.hf import skeleton
from coterie.hf.dense import linear_names
from coterie.hf.empty import empty_model
from coterie.hf.inference.latent import operations
from coterie.hf.layout import Layout
from coterie.hf.modules import number_layers, read_layouts
from coterie.hf.sizes import expert_nbytes, expert_parameters, rest_of

PROMPT = 512  # tokens of the prompt whose speed is predicted


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer, and how many of them a token uses; `number` is the layer's in packed checkpoints."""

    name: str
    number: int
    layout: Layout
    per_token: int


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer outside the experts that can be packed.

    read: by every token; not so the layers of a vision tower. shared: its weight is the embedding's.
    """

    name: str
    rows: int
    columns: int
    read: bool
    head: bool
    shared: bool


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What of a model takes memory; bytes are those of the bf16 model unless a format is named."""

    model_type: str
    experts: tuple[ExpertLayer, ...]
    rest_parameters: int  # everything but the experts
    rest_nbytes: int
    active_rest_parameters: int  # those of the rest that one token reads: no table of embeddings, no vision tower
    head_parameters: int  # of the head, which a prompt needs for its last token alone
    context: int
    cache_nbytes: int  # KV cache of one sequence of `context` tokens
    linears: tuple[LinearLayer, ...] = ()
    layers: int = 0
    prompt_operations: int = 0  # of PROMPT tokens with each other, in attention
    latent_operations: int = 0  # of a decoded token with `context` latents, where attention goes to such

    @property
    def expert_parameters(self) -> int:
        return sum(layer.layout.num_experts * expert_parameters(layer.layout) for layer in self.experts)

    @property
    def active_expert_parameters(self) -> int:
        """Parameters of experts that one token uses."""
        return sum(layer.per_token * expert_parameters(layer.layout) for layer in self.experts)

    @property
    def parameters(self) -> int:
        return self.expert_parameters + self.rest_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token reads."""
        return self.active_expert_parameters + self.active_rest_parameters

    @property
    def rest_read_nbytes(self) -> int:
        """Bytes of everything but the experts that one token reads."""
        return 2 * self.active_rest_parameters

    def experts_nbytes(self, formats: ModelFormats) -> int:
        return sum(x.layout.num_experts * expert_nbytes(x.layout, formats[x.number]) for x in self.experts)

    def experts_read_nbytes(self, formats: ModelFormats) -> int:
        """Bytes of experts that one token reads."""
        return sum(x.per_token * expert_nbytes(x.layout, formats[x.number]) for x in self.experts)


def inspect(config: Any, context: int = 4096) -> Anatomy:
    """The anatomy of the model of a Transformers config, for sequences of `context` tokens.

    Raises UnsupportedModelError for a model that coterie cannot run.
    """
    if context < 1:
        raise ArgumentError(f"context is {context} tokens, expected at least 1")
    model = empty_model(config, dtype=torch.bfloat16).eval()
    layouts = read_layouts(model)
    cache, per_token = skeleton.trace(model, context)
    numbers = number_layers(list(layouts))
    modules = {name: model.get_submodule(name) for name in layouts}
    rest = rest_of(model, list(modules.values()))
    language = sum(p.numel() for p in rest_of(model.get_decoder(), list(modules.values())))
    head = model.get_output_embeddings()
    head_parameters = head.weight.numel() if head is not None else 0
    decoder = set(model.get_decoder().modules())
    tied = model.all_tied_weights_keys
    linears = [(name, model.get_submodule(name)) for name in linear_names(model)]
    return Anatomy(
        model_type=config.model_type,
        experts=tuple(
            ExpertLayer(name, numbers[name], layout, per_token[modules[name]])
            for name, layout in layouts.items()
            if modules[name] in per_token
        ),
        rest_parameters=sum(p.numel() for p in rest),
        rest_nbytes=sum(p.nbytes for p in rest),
        active_rest_parameters=language - model.get_input_embeddings().weight.numel() + head_parameters,
        head_parameters=head_parameters,
        context=context,
        cache_nbytes=cache,
        layers=config.get_text_config().num_hidden_layers,
        prompt_operations=skeleton.attention_operations(model, PROMPT),
        latent_operations=operations(model, context),
        linears=tuple(
            LinearLayer(
                name,
                module.out_features,
                module.in_features,
                read=module in decoder or module is head,
                head=module is head,
                shared=f"{name}.weight" in tied,
            )
            for name, module in linears
        ),
    )
