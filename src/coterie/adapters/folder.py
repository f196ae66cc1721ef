"""An adapter's folder and the base model it belongs to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open

from coterie.checkpoints.tensorwriter import sync_folder, sync_tree, temporary_beside
from coterie.errors import ArgumentError, CheckpointError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def read_adapter_config(folder: Path) -> LoraConfig:
    """The configuration of a whole LoRA adapter of a causal LM. Raises CheckpointError or ArgumentError."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}: expected the folder of a PEFT adapter")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from error
    try:
        with safe_open(folder / WEIGHTS, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is damaged: {error}") from None
    if not isinstance(config, LoraConfig):
        raise ArgumentError(f"{folder} is a {config.peft_type} adapter; expected LoRA")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ArgumentError(f"{folder} is an adapter for {config.task_type}; expected CAUSAL_LM")
    return config


def base_of(folder: Path, config: LoraConfig, model: str | None) -> str:
    """The base model: `model`, or what the adapter says it was trained on. Raises ArgumentError where neither is."""
    base = model or config.base_model_name_or_path
    if not base:
        raise ArgumentError(f"{folder / CONFIG} does not name its base model; give it with --model")
    return base


@contextmanager
def finished(output: Path) -> Iterator[Path]:
    """A folder to write to that becomes `output` when all is written, and vanishes when not.

    Raises ArgumentError where `output` is neither new nor empty, CheckpointError when the system refuses a write.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ArgumentError(f"{output} is not empty; give a new folder")
    partial = temporary_beside(output, ".partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        if output.exists():
            output.rmdir()
        sync_tree(partial)
        os.replace(partial, output)
        sync_folder(output.parent)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {output}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
