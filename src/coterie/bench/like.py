"""Which model to make: its config by name or from where one is, with as many layers as are asked for."""

from __future__ import annotations

import copy
from typing import Any

from coterie.bench.random_model import qwen3_30b
from coterie.errors import ArgumentError
from coterie.plan import open_source

LAYERS, VOCABULARY = 48, 151936  # of Qwen3-30B-A3B


def config_like(model: str, layers: int | None = None, vocabulary: int | None = None) -> tuple[Any, int]:
    """(the config of a model, how many layers the whole one has).

    model: "qwen3-30b", a model's folder, its config.json or a hub id. layers: the first ones; all where there are
    fewer. vocabulary: another size of it. Raises ArgumentError for sizes below 1, and what `open_source` raises.
    """
    if min(1 if n is None else n for n in (layers, vocabulary)) < 1:
        raise ArgumentError(f"layers={layers}, vocabulary={vocabulary}: expected both at least 1")
    config = qwen3_30b(LAYERS, VOCABULARY) if model == "qwen3-30b" else copy.deepcopy(open_source(model).config)
    text = config.get_text_config()
    whole = text.num_hidden_layers
    if layers is not None and layers < whole:
        for name, value in vars(text).items():
            if isinstance(value, list) and len(value) == whole:  # what each layer is
                setattr(text, name, value[:layers])
        text.num_hidden_layers = layers
    if vocabulary is not None:
        text.vocab_size = vocabulary
    return config, whole
