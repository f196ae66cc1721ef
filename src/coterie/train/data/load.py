"""Data sets of a fine-tuning file: read, brought into tokens, and divided into rows to train and to evaluate on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset

from coterie.errors import ArgumentError
from coterie.train.config import DatasetConfig, TrainConfig
from coterie.train.data.formats import columns_of, extra_columns, pair_of, tell_kind, wanted_kinds
from coterie.train.data.tokens import Found, tokenise

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_datasets(config: TrainConfig, folder: Path, tokenizer: Any) -> tuple[Dataset, Dataset | None, list[Found]]:
    """(what to train on, what to evaluate on or None, what was found in each entry).

    Relative paths are seen from `folder`, then from here. Rows have input_ids and labels; of preferences chosen and
    rejected (and maybe prompt). Raises ArgumentError for a file that is missing or not what its type says, and where
    no row is left.
    """
    train, found = load_all(config, "datasets", folder, tokenizer)
    test = None
    if config.test_datasets:
        test, more = load_all(config, "test_datasets", folder, tokenizer)
        found += more
    if config.val_set_size:
        size = config.val_set_size if config.val_set_size < 1 else int(config.val_set_size)
        if size >= len(train):
            raise ArgumentError(f"val_set_size: expected less than the {len(train)} rows of datasets, found {size}")
        parts = train.train_test_split(test_size=size, seed=config.seed)
        train = parts["train"]
        test = parts["test"] if test is None else concatenate_datasets([test, parts["test"]])
    return train, test, found


def load_all(config: TrainConfig, name: str, folder: Path, tokenizer: Any) -> tuple[Dataset, list[Found]]:
    """The entries of `datasets` or `test_datasets` one after the other; all must have the same columns."""
    found = [load_one(entry, config, folder, tokenizer) for entry in getattr(config, name)]
    parts = [each.data for each in found if len(each.data)]
    if not parts:
        why = "; ".join(line for each in found for line in each.gaps())
        raise ArgumentError(f"{name}: nothing is left to learn: {why}")
    if any(part.column_names != parts[0].column_names for part in parts):
        columns = " and ".join(sorted({", ".join(part.column_names) for part in parts}))
        raise ArgumentError(f"{name}: expected the same columns in all, found {columns}; train on them one by one")
    return concatenate_datasets(parts), found


def locate(path: str, folder: Path) -> Path | None:
    """The local file or folder that `path` names, None for a Hugging Face id. Raises ArgumentError."""
    for candidate in (folder / path, Path(path)):
        if candidate.exists():
            return candidate
    if Path(path).suffix in BUILDERS or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ArgumentError(f"{path} is not there; looked in {folder.resolve()} and in {Path.cwd()}")
    return None


def load_one(entry: DatasetConfig, config: TrainConfig, folder: Path, tokenizer: Any) -> Found:
    """An entry's rows in tokens. Raises ArgumentError."""
    file = locate(entry.path, folder)
    rows = read_rows(entry, file)
    kind = tell_kind(rows.column_names, entry, wanted_kinds(config))
    required = columns_of(kind, rows.column_names, entry)
    if file is not None and file.suffix == ".jsonl":
        holes = [name for name in required if rows.data.column(name).null_count]
        if holes:
            check_lines(entry.path, file, holes)
    rows = rows.select_columns([*required, *extra_columns(kind, rows.column_names, required)])
    is_chat = kind in ("chat_template", "alpaca")
    if kind == "preference" and isinstance(rows[0]["chosen"], list):
        is_chat = True
        rows = rows.map(pair_of, fn_kwargs={"entry": entry}, remove_columns=rows.column_names, desc="Reading")
    if is_chat and tokenizer.chat_template is None:
        raise ArgumentError(
            f"{entry.path} has chats, but {config.base_model} has no chat template: set chat_template: chatml, "
            "or give a Jinja file"
        )
    return tokenise(rows, kind, entry, config, tokenizer)


def read_rows(entry: DatasetConfig, file: Path | None) -> Dataset:
    try:
        if file is None:
            rows = load_dataset(entry.path, entry.name, split=entry.split)
        elif file.is_dir():
            rows = load_dataset(str(file), entry.name, split=entry.split)
        elif file.suffix in BUILDERS:
            more = {"sample_by": "paragraph"} if file.suffix == ".txt" else {}
            rows = load_dataset(BUILDERS[file.suffix], data_files=str(file), split="train", **more)
        else:
            raise ArgumentError(f"{file}: expected a file ending in {', '.join(BUILDERS)}")
    except ArgumentError:
        raise
    except Exception as error:  # data sets fail in as many ways as there are readers
        if file is not None and file.suffix == ".jsonl":
            check_lines(entry.path, file, [])
        cause = error.__cause__ or error
        raise ArgumentError(f"cannot read {entry.path}: {type(cause).__name__}: {cause}") from error
    if not len(rows):
        raise ArgumentError(f"{entry.path} has no rows")
    return rows


def check_lines(name: str, file: Path, required: list[str]) -> None:
    """Raises ArgumentError for the first row of a JSONL file that is not JSON, has other columns, or other types."""
    kinds: dict[str, type] = {}
    with file.open("rb") as lines:
        for number, line in enumerate((line for line in lines if line.strip()), start=1):
            try:
                row = json.loads(line)
            except ValueError as error:  # JSON's errors and those of UTF-8
                raise ArgumentError(f"{name}: row {number} is not JSON: {error}: {line[:60]!r}") from None
            if not isinstance(row, dict):
                raise ArgumentError(f"{name}: row {number}: expected an object {{...}}, found {type(row).__name__}")
            missing = [column for column in required if column not in row]
            if missing:
                raise ArgumentError(
                    f"{name}: row {number}: expected {', '.join(missing)}, found {', '.join(row) or 'no columns'}"
                )
            for column, value in row.items():
                if value is not None and kinds.setdefault(column, type(value)) is not type(value):
                    before = kinds[column].__name__
                    raise ArgumentError(
                        f"{name}: row {number}: {column}: expected {before} as in the rows before, found "
                        f"{type(value).__name__}"
                    )
