"""The activation that a config.json calls for."""

import pytest

from coterie.activations import Activation
from coterie.checkpoints.activation import activation_of
from coterie.errors import UnsupportedModelError

GPT_OSS = Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0)


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, Activation("silu")),
        ({"hidden_act": "swish"}, Activation("silu")),
        ({"hidden_act": "gelu"}, Activation("gelu")),
        ({"hidden_act": "gelu_pytorch_tanh"}, Activation("gelu_tanh")),
        ({"hidden_activation": "relu"}, Activation("relu")),
        ({"model_type": "nemotron_h", "mlp_hidden_act": "relu2", "hidden_act": None}, Activation("relu2")),
        ({"model_type": "gpt_oss", "hidden_act": "silu"}, GPT_OSS),
        ({"model_type": "gpt_oss", "swiglu_limit": 5}, Activation("silu", 1.702, 5.0, 1.0)),
        ({"model_type": "deepseek_v4", "hidden_act": "silu"}, Activation("silu", limit=10.0)),
    ],
)
def test_activation(config, expected):
    assert activation_of(config) == expected


def test_unknown():
    with pytest.raises(UnsupportedModelError, match="'mish' are not supported; supported: silu"):
        activation_of({"hidden_act": "mish"})
