"""A checkpoint written into a folder that may hold an older one: beside it first, then put in its place by renames."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from coterie.checkpoints.folder import INDEX, PACKED_INDEX, SINGLE
from coterie.checkpoints.packed import FILE_NAME, UNFINISHED
from coterie.checkpoints.tensorfile import TensorFile
from coterie.checkpoints.tensorwriter import remove_empty, sync_folder, sync_tree, write_error, write_text
from coterie.errors import CheckpointError

SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
ONE_SHARD = "model-00001-of-00001.safetensors"


@contextmanager
def replaced_folder(folder: Path, needed: int) -> Iterator[Path]:
    """A new folder within `folder`, whose files replace those of the checkpoint there when the block is left.

    Left with an exception, the checkpoint that was there is as it was. Its files are deleted last, and memory mapped
    from them stays valid. While files are being renamed the folder holds the mark of an unfinished one; should that be
    interrupted, every new file is whole, in `folder` already or in the new folder still.
    needed: the bytes that the files will take. Raises CheckpointError where they do not fit or cannot be written.
    """
    existed = folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix="coterie-saving-", dir=folder))
    except OSError as error:
        raise write_error(folder, error) from error
    try:
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise CheckpointError(
                f"not enough space for {folder}: the checkpoint takes {needed / 1e6:,.1f} MB beside what is there, "
                f"{free / 1e6:,.1f} MB are free"
            )
        yield new
        write_text(new / UNFINISHED, json.dumps({"new files": new.name}) + "\n")
        names = sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file())
        sync_tree(new)
    except BaseException as error:
        shutil.rmtree(new, ignore_errors=True)
        if not existed:
            remove_empty(folder)
        if isinstance(error, OSError):
            raise write_error(folder, error) from error
        raise
    try:
        _switch(folder, new, names)
    except OSError as error:
        raise CheckpointError(
            f"cannot finish {folder}: {error.strerror or error}. The new files are whole: move those still in {new} "
            f"to {folder}, then delete {folder / UNFINISHED}"
        ) from error


def _switch(folder: Path, new: Path, names: list[str]) -> None:
    """Moves the new files to their places, the mark first; then deletes what is left of the older checkpoint."""
    for name in sorted(names, key=lambda name: name != UNFINISHED):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(new / name, folder / name)
        if name == UNFINISHED:
            sync_folder(folder)
    sync_folder(folder)
    for file in list(folder.iterdir()):
        of_checkpoint = file.name in (SINGLE, INDEX) or SHARD.fullmatch(file.name) or FILE_NAME.fullmatch(file.name)
        if of_checkpoint and file.name not in names:
            file.unlink()
    (folder / UNFINISHED).unlink()
    shutil.rmtree(new)
    sync_folder(folder)


def write_index(folder: Path) -> None:
    """Names the shards that Transformers wrote, and those of the experts, in the index of a packed checkpoint."""
    (folder / INDEX).unlink(missing_ok=True)
    if (folder / SINGLE).exists():
        os.replace(folder / SINGLE, folder / ONE_SHARD)
    entries = {file.name: TensorFile(file).entries for file in sorted(folder.glob("*.safetensors"))}
    total = sum(entry.nbytes for file in entries.values() for entry in file.values())
    weight_map = {name: file for file, names in entries.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / PACKED_INDEX, json.dumps(index, indent=2) + "\n")
