"""An adapter's folder, and the base model it belongs to."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open

from coterie.checkpoints.gguf_file import find_gguf
from coterie.checkpoints.tensorwriter import copy_file
from coterie.errors import ArgumentError, CheckpointError

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
TASKS = ("CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS")


def read_adapter_config(folder: Path) -> LoraConfig:
    """The configuration of a whole LoRA adapter. Raises CheckpointError or ArgumentError."""
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
    if config.task_type not in (None, *TASKS):
        raise ArgumentError(f"{folder} is an adapter for {config.task_type}; expected one for {', '.join(TASKS)}")
    if getattr(config, "layer_replication", None):
        raise ArgumentError(f"{folder} repeats layers of its base model (layer_replication), which is not supported")
    if config.bias == "all":
        raise ArgumentError(f"{folder} has biases of modules without LoRA (bias='all'), which is not supported")
    return config


def base_of(folder: Path, config: LoraConfig, model: str | None) -> tuple[str, str | None]:
    """The base model: `model`, or what the adapter says it was trained on; and the revision of that.

    Raises ArgumentError where neither is.
    """
    if model and model != config.base_model_name_or_path:
        return model, None
    if not config.base_model_name_or_path:
        raise ArgumentError(f"{folder / CONFIG} does not name its base model; give it with --model")
    return config.base_model_name_or_path, config.revision


def local(base: str, revision: str | None) -> Path:
    """The folder of a base model; one on the Hub is fetched. Raises CheckpointError, for a GGUF file too."""
    check_there(base)
    if find_gguf(base) is not None:
        raise CheckpointError(
            f"{base} is a GGUF file: expected a checkpoint folder, which `coterie convert cpu` makes of it; give that "
            "with --model"
        )
    return Path(base) if Path(base).is_dir() else Path(snapshot_download(base, revision=revision))


def check_there(base: str) -> None:
    """Raises CheckpointError for a path that is not there; what may be a Hub id is left to the Hub."""
    if Path(base).is_absolute() and not Path(base).is_dir() and find_gguf(base) is None:
        raise CheckpointError(f"{base} is not there: give the base model with --model")


def copy(source: Path, target: Path) -> None:
    """Copies a file, and makes its folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    copy_file(source, target)
