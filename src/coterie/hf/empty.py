"""Models without weights, built by Transformers from a config alone."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from coterie.errors import UnsupportedModelError


def empty_model(config: Any, auto_class: Any = None, **options: Any) -> Any:
    """A model on the meta device: shapes and no storage. Arguments and errors are those of `make_model`."""
    with torch.device("meta"):
        return make_model(config, auto_class, **options)


def unfilled_model(config: Any, auto_class: Any = None, **options: Any) -> Any:
    """A model in RAM whose weights are not set, and take no memory until they are written; its buffers are right."""
    with no_init_weights():
        model = make_model(config, auto_class, **options)
    model.tie_weights()
    return model


def make_model(config: Any, auto_class: Any = None, **options: Any) -> Any:
    """The model of a Transformers config, without its weights, on the default device.

    auto_class: what chooses its class, AutoModelForCausalLM say; None: the class that `config` names first where
    Transformers has it, else a causal LM. options: `dtype`, `trust_remote_code`.
    Raises UnsupportedModelError, in one line, where there is no such class or it cannot be built from the values.
    """
    named = None if auto_class else getattr(transformers, (config.architectures or [""])[0] or "", None)
    kind = named if hasattr(named, "_from_config") else auto_class or AutoModelForCausalLM
    make = kind._from_config if kind is named else kind.from_config
    try:
        return make(config, **options)
    except Exception as error:  # a model's own code, run on values that nothing has checked
        reason = " ".join(str(error).split())[:300]
        raise UnsupportedModelError(f"{config.model_type} cannot be built as {kind.__name__}: {reason}") from error
