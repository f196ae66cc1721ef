"""Finding the checkpoint that a run goes on from, and refusing one that is not whole."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from coterie.checkpoints.folder import read_json
from coterie.errors import ArgumentError, CheckpointError
from coterie.train.config import TrainConfig

STATE = "trainer_state.json"
FILES = (STATE, "optimizer.pt", "scheduler.pt")


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, checked; None to begin anew.

    Raises CheckpointError, and ArgumentError for one after which this run has no step left.
    """
    if config.resume_from_checkpoint:
        checkpoint = check_checkpoint(Path(config.resume_from_checkpoint))
    elif config.auto_resume_from_checkpoints and Path(config.output_dir).is_dir():
        last = get_last_checkpoint(config.output_dir)
        if last is None:
            return None
        checkpoint = check_checkpoint(Path(last))
    else:
        return None
    check_goes_on(config, checkpoint)
    return checkpoint


def check_goes_on(config: TrainConfig, checkpoint: Path) -> None:
    """Raises ArgumentError where a checkpoint is the run's last: Trainer would train a step too many."""
    state = read_json(checkpoint / STATE)
    limit, done = ("max_steps", "global_step") if config.max_steps > 0 else ("num_epochs", "epoch")
    if (state.get(done) or 0) >= getattr(config, limit):
        raise ArgumentError(
            f"{checkpoint} is where this run ends already, and what it trained is in there; raise {limit} "
            f"({getattr(config, limit)}) to go on from it"
        )


def check_checkpoint(folder: Path) -> Path:
    """The folder, if it holds a whole checkpoint of Transformers' Trainer. Raises CheckpointError."""
    if not folder.is_dir():
        raise CheckpointError(f"resume_from_checkpoint: {folder} is not a folder; expected one like checkpoint-100")
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: {', '.join(missing)} missing; resume an earlier one"
        )
    try:
        json.loads((folder / STATE).read_text(encoding="utf-8"))["global_step"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} is damaged ({error}); resume an earlier checkpoint") from None
    for file in sorted((*folder.glob("*.pt"), *folder.glob("*.pth"))):
        if not zipfile.is_zipfile(file):  # as torch.save writes it; its end is what a stop cuts off
            raise CheckpointError(f"{file} is damaged (cut off, or empty); resume an earlier checkpoint")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"{folder} has no weights (*.safetensors); resume an earlier checkpoint")
    for file in weights:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged ({error}); resume an earlier checkpoint") from None
    return folder
