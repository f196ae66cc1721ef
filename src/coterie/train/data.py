"""Data sets of a fine-tuning file, brought into the columns that TRL's trainers read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset

from coterie.errors import ArgumentError
from coterie.train.config import DatasetConfig, TrainConfig

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def load_datasets(config: TrainConfig, folder: Path) -> tuple[Dataset, Dataset | None]:
    """(training rows, rows to evaluate on or None). Relative paths are seen from `folder`, then from here.

    Rows have the columns `messages`, or `text`, or `chosen` and `rejected` (and maybe `prompt`), or `prompt`,
    `completions` and `labels`. Raises ArgumentError for a file that is missing or not what its type says.
    """
    train = load_all(config, config.datasets, folder)
    test = load_all(config, config.test_datasets, folder) if config.test_datasets else None
    if config.val_set_size:
        size = config.val_set_size if config.val_set_size < 1 else int(config.val_set_size)
        if size >= len(train):
            raise ArgumentError(f"val_set_size: expected less than the {len(train)} rows of datasets, found {size}")
        parts = train.train_test_split(test_size=size, seed=config.seed)
        train = parts["train"]
        test = parts["test"] if test is None else concatenate_datasets([test, parts["test"]])
    return train, test


def load_all(config: TrainConfig, entries: list[DatasetConfig], folder: Path) -> Dataset:
    """The entries one after the other; all must have the same columns."""
    parts = [load_one(entry, wanted_types(config), folder) for entry in entries]
    if any(part.column_names != parts[0].column_names for part in parts):
        found = " and ".join(sorted({", ".join(part.column_names) for part in parts}))
        raise ArgumentError(f"datasets: expected the same columns in all, found {found}; train on them one by one")
    return concatenate_datasets(parts)


def wanted_types(config: TrainConfig) -> tuple[str, ...]:
    """The types of data that what is to be trained can read."""
    if config.process_reward_model:
        return ("stepwise",)
    if config.rl or config.reward_model:
        return ("preference",)
    return ("chat_template", "completion", "alpaca")


def locate(path: str, folder: Path) -> Path | None:
    """The local file or folder that `path` names, None for a Hugging Face id. Raises ArgumentError."""
    for candidate in (folder / path, Path(path)):
        if candidate.exists():
            return candidate
    if Path(path).suffix in BUILDERS or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ArgumentError(f"{path} is not there; looked in {folder.resolve()} and in {Path.cwd()}")
    return None


def load_one(entry: DatasetConfig, wanted: tuple[str, ...], folder: Path) -> Dataset:
    file = locate(entry.path, folder)
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
        cause = error.__cause__ or error
        raise ArgumentError(f"cannot read {entry.path}: {type(cause).__name__}: {cause}") from error
    if not len(rows):
        raise ArgumentError(f"{entry.path} has no rows")
    return reshape(rows, entry, wanted)


def reshape(rows: Dataset, entry: DatasetConfig, wanted: tuple[str, ...]) -> Dataset:
    """Only the columns that training reads, by their usual names."""
    columns = {
        "chat_template": [entry.field_messages],
        "completion": [entry.field],
        "alpaca": ["instruction", "output"],
        "preference": ["chosen", "rejected"],
        "stepwise": ["prompt", "completions", "labels"],
    }
    found = set(rows.column_names)
    kind = entry.type or next((name for name in wanted if found.issuperset(columns[name])), None)
    if kind is None:
        expected = " or ".join(f"{', '.join(columns[name])} ({name})" for name in wanted)
        raise ArgumentError(f"{entry.path}: expected columns {expected}; found {', '.join(rows.column_names)}")
    if kind not in wanted:
        raise ArgumentError(f"{entry.path}: type: expected {' or '.join(wanted)} for this training, found {kind!r}")
    missing = [name for name in columns[kind] if name not in found]
    if missing:
        raise ArgumentError(
            f"{entry.path}: type {kind} needs the columns {', '.join(columns[kind])}; found {', '.join(sorted(found))}"
        )
    if kind == "alpaca":
        return rows.map(chat_of, remove_columns=rows.column_names)
    keep = [*columns[kind], *(["prompt"] if kind == "preference" and "prompt" in found else [])]
    rows = rows.select_columns(keep)
    names = {entry.field_messages: "messages"} if kind == "chat_template" else {}
    names |= {entry.field: "text"} if kind == "completion" else {}
    return rows.rename_columns({old: new for old, new in names.items() if old != new})


def chat_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row of instruction, input (maybe) and output as a chat."""
    asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": row["output"]}]}
