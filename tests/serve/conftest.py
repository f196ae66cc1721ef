"""An adapter of the bundled model, and copies of it that say other things of themselves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from coterie import tiny

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with LoRA on attention and experts, of random values that change what is said."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("adapter")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.PATH)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], target_parameters=targets, init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@pytest.fixture
def variant(tmp_path: Path) -> Callable[..., Path]:
    """variant(template=..., **config) -> a copy of the bundled model; template None: it has none."""

    def make(template: Callable[[str], str] | None = lambda text: text, **config: object) -> Path:
        folder = tmp_path / "variant"
        shutil.copytree(tiny.PATH, folder)
        file = folder / "chat_template.jinja"
        if template is None:
            file.unlink()
        else:
            file.write_text(template(file.read_text()))
        stored = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(stored | config))
        return folder

    return make
