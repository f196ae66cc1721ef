"""How tokens are chosen: a model's own settings, and what was asked for instead."""

from __future__ import annotations

import copy
from typing import Any

from transformers import GenerationConfig


def settings(default: GenerationConfig, **asked: Any) -> GenerationConfig:
    """A model's generation config, changed by what of `asked` is not None.

    A temperature of 0 takes the likeliest token; any other sampling option turns sampling on.
    """
    made = copy.deepcopy(default)
    asked = {name: value for name, value in asked.items() if value is not None}
    if asked.get("temperature") == 0:
        made.do_sample = False
        for name in ("temperature", "top_p", "top_k", "min_p"):
            asked.pop(name, None)
            setattr(made, name, None)
    elif asked.keys() & {"temperature", "top_p", "top_k", "min_p"}:
        made.do_sample = True
    for name, value in asked.items():
        setattr(made, name, value)
    return made
