"""Finding the checkpoint that a run goes on from, and refusing one that is not whole."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import get_last_checkpoint

from coterie.errors import CheckpointError
from coterie.train.config import TrainConfig

STATE = "trainer_state.json"
FILES = (STATE, "optimizer.pt", "scheduler.pt")


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, checked; None to begin anew. Raises CheckpointError."""
    if config.resume_from_checkpoint:
        return check_checkpoint(Path(config.resume_from_checkpoint))
    if config.auto_resume_from_checkpoints and Path(config.output_dir).is_dir():
        last = get_last_checkpoint(config.output_dir)
        return check_checkpoint(Path(last)) if last else None
    return None


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
