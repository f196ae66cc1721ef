"""Everything about a fine-tuning file that can be found before the experts are packed, which takes minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.integrations import get_available_reporting_integrations

from coterie.errors import ArgumentError
from coterie.hf.loading import check_folder
from coterie.train.config import TrainConfig
from coterie.train.data import load_datasets, locate
from coterie.train.empty import check_model
from coterie.train.model import load_tokenizer
from coterie.train.packing import check_packing


@dataclass(frozen=True)
class Checked:
    """What a run starts from.

    train, test: rows in tokens; preferences as TRL reads them. findings: lines about the data, for people.
    packing_tried: whether packing was found to be safe; if not, that is still to be tried on the model itself.
    """

    base: str
    tokenizer: Any
    train: Dataset
    test: Dataset | None
    findings: list[str]
    packing_tried: bool


def check_all(config: TrainConfig, folder: Path) -> Checked:
    """The data and the names of a fine-tuning file, checked; relative paths are seen from `folder`.

    Loads no weights and writes nothing. Raises ArgumentError, CheckpointError or UnsupportedModelError.
    """
    base = base_model(config, folder)
    if Path(base).is_dir():
        check_folder(Path(base))
    check_reporting(config.report_to)
    check_model(config, base)
    packing_tried = not config.sample_packing or check_packing(base, config.trust_remote_code)
    tokenizer = load_tokenizer(config, base, folder)
    train, test, found = load_datasets(config, folder, tokenizer)
    findings = [line for each in found for line in each.lines(config.sequence_len)]
    return Checked(base, tokenizer, train, test, findings, packing_tried)


def base_model(config: TrainConfig, folder: Path) -> str:
    """The model's folder, or its Hugging Face id."""
    found = locate(config.base_model, folder)
    return str(found) if found else config.base_model


def check_reporting(names: list[str]) -> None:
    """Raises ArgumentError for a place to report to that Transformers does not know or that is not installed."""
    available = get_available_reporting_integrations()
    for name in names:
        if name not in (*available, "all"):
            found = ", ".join(available) or "none"
            raise ArgumentError(f"report_to: {name} is not installed (found {found}): pip install {name}")
