"""The model card (README.md) of a fine-tuned folder: what it was trained from, and on what."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from coterie.adapters.folder import CONFIG
from coterie.checkpoints.folder import read_json
from coterie.checkpoints.tensorwriter import write_text

PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification", "TOKEN_CLS": "token-classification"}

ADAPTER = """
A LoRA adapter. With coterie the base model's experts stay packed in memory:

```python
import coterie
from peft import PeftModel

model = PeftModel.from_pretrained(coterie.from_pretrained("{base}"), "{folder}")
```
"""


def write_card(folder: Path, base_model: str, datasets: list[str]) -> None:
    """Writes the README.md of a folder that an adapter (or a model) was saved to, in the place of one that is there.

    base_model, datasets: Hub ids, or paths as they are found from here; the card's metadata names those on the Hub
    alone, its text all of them.
    Raises CheckpointError when the system refuses the write.
    """
    adapter = read_json(folder / CONFIG) if (folder / CONFIG).exists() else None
    task = adapter.get("task_type") if adapter else None
    data = ModelCardData(
        base_model=base_model if on_hub(base_model) else None,
        datasets=[name for name in datasets if on_hub(name)] or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=PIPELINES.get(str(task)),
        tags=["coterie", "lora"] if adapter else ["coterie"],
    )
    lines = [f"# {folder.resolve().name}", "", f"- Base model: {link(base_model, '')}"]
    lines += [f"- Trained on: {link(name, 'datasets/')}" for name in datasets]
    text = "\n".join(lines) + "\n" + (ADAPTER.format(base=base_model, folder=folder.resolve().name) if adapter else "")
    write_text(folder / "README.md", str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")))


def on_hub(name: str) -> bool:
    """Whether a name is a Hub id and nothing on this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def link(name: str, kind: str) -> str:
    return f"[{name}](https://huggingface.co/{kind}{name})" if on_hub(name) else f"`{name}`"
