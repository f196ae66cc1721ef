from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model

sys.path.append(str(Path(__file__).parent.parent / "hf"))  # tiny_models

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture
def adapt(tmp_path) -> Callable[..., PeftModel]:
    """adapt(model, r=3, ...) -> the model under an adapter of random values, which is saved to tmp_path / "adapter"."""

    def adapt(model, **changes) -> PeftModel:
        torch.manual_seed(0)
        adapted = get_peft_model(model, LoraConfig(**{"r": 4, "init_lora_weights": False, **changes})).eval()
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if re.search("modules_to_save|trainable_tokens_delta", name) or (
                    name.endswith("bias") and parameter.requires_grad
                ):
                    parameter.add_(0.5 * parameter.std() * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / "adapter")
        return adapted

    return adapt
