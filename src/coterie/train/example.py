"""The commented example that `coterie sft --init` writes: every key there is, with its default."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import yaml

from coterie import tiny
from coterie.checkpoints.tensorwriter import write_text
from coterie.errors import ArgumentError
from coterie.train.config import DatasetConfig, TrainConfig, describe, is_union

DATA = tiny.PATH.parent / "instructions"
HEADER = """\
# A fine-tuning file of coterie. It runs as it is, on the small model that ships with coterie:
#   coterie sft {name}
# Every key is here; those behind a # have the value that is their default.
"""


def write_example(path: Path) -> None:
    """Writes the example to a new file. Raises ArgumentError where there is one, CheckpointError where none can be."""
    if path.exists():
        raise ArgumentError(f"{path} is there already; give the name of a new file")
    write_text(path, example(path))


def example(path: Path) -> str:
    """The text of the example; `path` names its output folder."""
    given = {
        "base_model": str(tiny.PATH),
        "experts": "int4",
        "datasets": [{"path": str(DATA / "train.jsonl"), "type": "chat_template"}],
        "test_datasets": [{"path": str(DATA / "heldout.jsonl")}],
        "sequence_len": 256,
        "sample_packing": True,
        "adapter": "lora",
        "micro_batch_size": 2,
        "max_steps": 30,
        "learning_rate": 1e-3,
        "output_dir": f"{path.stem}-output",
    }
    hints = typing.get_type_hints(TrainConfig)
    lines = [HEADER.format(name=path.name)]
    for key in dataclasses.fields(TrainConfig):
        lines.append(f"# {key.metadata['about']} ({kind(hints[key.name])})")
        if key.name == "datasets":
            lines += [f"#   {k.name}: {k.metadata['about']}" for k in dataclasses.fields(DatasetConfig)]
        value = given.get(key.name, default(key))
        text = yaml.safe_dump({key.name: value}, width=1000, allow_unicode=True).strip()
        lines += [text if key.name in given else "# " + text.replace("\n", "\n# "), ""]
    return "\n".join(lines)


def default(key: dataclasses.Field) -> Any:
    return key.default_factory() if key.default_factory is not dataclasses.MISSING else key.default


def kind(hint: Any) -> str:
    """The type of a key in a user's words."""
    choices = [h for h in typing.get_args(hint) if h is not type(None)] if is_union(hint) else [hint]
    return " or ".join(map(describe, choices))
