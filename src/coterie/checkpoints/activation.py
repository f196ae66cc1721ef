"""The experts' activation, read off a model's config."""

from __future__ import annotations

from collections.abc import Mapping

from coterie.activations import Activation
from coterie.errors import UnsupportedModelError

KINDS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
# Models whose gate is clamped and whose up is shifted by one, whatever hidden_act says.
OFFSET_GLU = {"gpt_oss", "openai_privacy_filter", "minimax_m3", "minimax_m3_vl", "minimax_m3_vl_text"}
CLAMPED_GLU = {"deepseek_v4"}


def activation_of(config: Mapping) -> Activation:
    """The activation of the experts of a model with that config.json (silu where it does not say).

    Raises UnsupportedModelError for one that no kernel computes.
    """
    model = config.get("model_type")
    if model in OFFSET_GLU:
        alpha, limit = config.get("swiglu_alpha", 1.702), config.get("swiglu_limit", 7.0)
        return Activation("silu", alpha=float(alpha), limit=float(limit), up_offset=1.0)
    if model in CLAMPED_GLU:
        return Activation("silu", limit=float(config.get("swiglu_limit", 10.0)))
    keys = ("mlp_hidden_act", "hidden_act", "hidden_activation")
    name = next((config[key] for key in keys if config.get(key) is not None), "silu")
    if name not in KINDS:
        raise UnsupportedModelError(
            f"experts with activation {name!r} are not supported; supported: {', '.join(KINDS)}"
        )
    return Activation(KINDS[name])
