"""What a forward takes here whatever a model's size: measured on the bundled one, whose weights are next to nothing."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache
from transformers.utils import logging

from coterie import tiny
from coterie.hf.loading import from_pretrained

CALLS = 40  # of which the median is taken


def overhead() -> tuple[float, float]:
    """(seconds of a layer, seconds of a forward besides) of one token: Python, small operators, threads called up."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = from_pretrained(tiny.PATH, experts="int8", dense="int8")
    finally:
        if shown:
            logging.enable_progress_bar()
    decoder, layers = model.get_decoder(), model.get_decoder().layers
    all_layers = _seconds(model)
    decoder.layers = layers[:1]
    one = _seconds(model)
    layer = max(0.0, all_layers - one) / (len(layers) - 1)
    return layer, max(0.0, one - layer)


@torch.inference_mode()
def _seconds(model: Any) -> float:
    cache, token, times = DynamicCache(config=model.config), torch.zeros(1, 1, dtype=torch.long), []
    for _ in range(CALLS):
        start = time.perf_counter()
        model(input_ids=token, past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
