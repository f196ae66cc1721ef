"""Models without weights: of the class that is asked for, or that the config names."""

import pytest
import tiny_models
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
)

from coterie.errors import UnsupportedModelError
from coterie.hf.empty import empty_model


def config_of(architectures):
    return AutoConfig.for_model(
        "qwen3_moe", **tiny_models.COMMON, **tiny_models.FAMILIES["qwen3_moe"], architectures=architectures
    )


CASES = {
    "named": (["Qwen3MoeForSequenceClassification"], None, "Qwen3MoeForSequenceClassification"),
    "named, not known": (["SomebodysMoe"], None, "Qwen3MoeForCausalLM"),
    "none named": (None, None, "Qwen3MoeForCausalLM"),
    "asked for": (["Qwen3MoeForCausalLM"], AutoModelForSequenceClassification, "Qwen3MoeForSequenceClassification"),
    "the same": (["Qwen3MoeForSequenceClassification"], AutoModelForCausalLM, "Qwen3MoeForCausalLM"),
}


@pytest.mark.parametrize("architectures, auto_class, expected", CASES.values(), ids=CASES)
def test_class(architectures, auto_class, expected):
    model = empty_model(config_of(architectures), auto_class, dtype=torch.bfloat16)
    assert type(model).__name__ == expected
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in model.parameters())


def test_no_such_class():
    refused = r"^qwen3_moe cannot be built as AutoModelForImageTextToText: .{,300}$"
    with pytest.raises(UnsupportedModelError, match=refused):
        empty_model(config_of(None), AutoModelForImageTextToText)


def test_values_that_no_model_takes():
    config = config_of(None)
    config.hidden_act = "nonsense"
    with pytest.raises(UnsupportedModelError, match=r"^qwen3_moe cannot be built as AutoModelForCausalLM: .*nonsense"):
        empty_model(config)
