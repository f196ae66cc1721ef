"""The folder of a run: what runs leave there, so that no run replaces another's work, or mixes with it, unasked."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from coterie.checkpoints.tensorwriter import sync_folder
from coterie.errors import ArgumentError, CheckpointError
from coterie.train.callbacks import SNAPSHOT, TRACE
from coterie.train.config import TrainConfig
from coterie.train.metrics import METRICS
from coterie.train.resume import find_checkpoint

CURVE = "loss.png"
ARGUMENTS = "training_args.bin"
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
ADAPTER = re.compile(r"adapter_config\.json|adapter_model.*\.(safetensors|bin)")
MODEL = re.compile(
    r"(generation_)?config\.json|(model.*|coterie)\.safetensors(\.index\.json)?|(experts|linears)-\d+\.safetensors"
)
# Any of these says that there was a run; so they are removed last.
MARKS = re.compile(rf"{CHECKPOINT.pattern}|adapter_config\.json|{re.escape(ARGUMENTS)}|{re.escape(METRICS)}")
OTHERS = (CURVE, TRACE, SNAPSHOT)


def plan_output(config: TrainConfig, base_model: str, overwrite: bool = False) -> Path | None:
    """The checkpoint to go on from, None to begin anew, once the output folder is known to be free for that.

    base_model: its folder or id. overwrite: what an earlier run left in the output folder may go.
    Raises CheckpointError or ArgumentError; writes nothing.
    """
    folder = Path(config.output_dir)
    check_writable(folder)
    for key, path in (("base_model", base_model), ("lora_model_dir", config.lora_model_dir)):
        if path and folder.is_dir() and Path(path).is_dir() and folder.samefile(path):
            raise ArgumentError(f"output_dir: {folder} is {key}, and its files would be replaced; name another")
    anew = overwrite and config.auto_resume_from_checkpoints
    resume = None if anew else find_checkpoint(config)
    left = left_behind(folder, resume)
    if not left or overwrite:
        return resume
    names = ", ".join(path.name for path in left[:5]) + (", ..." if len(left) > 5 else "")
    if resume and is_inside(resume, folder):
        raise ArgumentError(
            f"{resume} is not the last checkpoint of {folder}; --overwrite takes away what came after it: {names}"
        )
    last = max((path for path in left if CHECKPOINT.fullmatch(path.name)), key=step, default=None)
    go_on = f"--resume to go on from {last.name}, " if last else ""
    raise ArgumentError(
        f"output_dir: {folder} holds an earlier run ({names}): {go_on}--overwrite to take it away, or name another "
        "folder"
    )


def check_writable(folder: Path) -> None:
    """Raises CheckpointError where `folder` cannot be written or made; writes nothing."""
    parent = folder
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise CheckpointError(f"output_dir: {folder} cannot be made: {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"output_dir: {folder} cannot be written: {parent} is read-only; name another folder")


def left_behind(folder: Path, resume: Path | None = None) -> list[Path]:
    """What an earlier run left in `folder` that has no place beside a new one, or beside one that goes on from
    `resume`; nothing where no run was. Those that say that a run was there come last."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    names = {path.name for path in there}
    if not any(map(MARKS.fullmatch, names)):
        return []
    if resume and is_inside(resume, folder):
        return [path for path in there if CHECKPOINT.fullmatch(path.name) and step(path) > step(resume)]
    whole_model = ARGUMENTS in names and "adapter_config.json" not in names
    ours = [
        path
        for path in there
        if MARKS.fullmatch(path.name)
        or path.name in OTHERS
        or ADAPTER.fullmatch(path.name)
        or (whole_model and MODEL.fullmatch(path.name))
    ]
    return sorted(ours, key=lambda path: MARKS.fullmatch(path.name) is not None)


def clear(folder: Path, resume: Path | None = None) -> None:
    """Takes away what `left_behind` finds. Raises CheckpointError when the system refuses."""
    for path in left_behind(folder, resume):
        remove = shutil.rmtree if path.is_dir() and not path.is_symlink() else os.remove
        try:
            remove(path)
        except OSError as error:
            raise CheckpointError(f"cannot remove {path}: {error.strerror or error}; remove it by hand") from error
    if folder.is_dir():
        sync_folder(folder)


def is_inside(checkpoint: Path, folder: Path) -> bool:
    return checkpoint.resolve().parent == folder.resolve()


def step(checkpoint: Path) -> int:
    return int(CHECKPOINT.fullmatch(checkpoint.name)[1])
