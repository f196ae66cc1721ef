"""Everything about a fine-tuning file that can be found before the experts are packed, which takes minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.integrations import get_available_reporting_integrations

from coterie.checkpoints.gguf_file import find_gguf
from coterie.errors import ArgumentError
from coterie.gpu.device import check_experts
from coterie.hf.loading import check_folder
from coterie.train.arguments import make_arguments
from coterie.train.config import TrainConfig
from coterie.train.data.load import load_datasets, locate
from coterie.train.empty import check_model
from coterie.train.model import load_tokenizer
from coterie.train.output import plan_output
from coterie.train.packing import check_packing
from coterie.train.processes import own_device


@dataclass(frozen=True)
class Checked:
    """What a run starts from.

    train, test: rows in tokens; preferences as TRL reads them. findings: lines about the data, for people.
    resume: the checkpoint to go on from.
    packing_tried: whether packing was found to be safe; if not, that is still to be tried on the model itself.
    """

    base: str
    resume: Path | None
    tokenizer: Any
    train: Dataset
    test: Dataset | None
    findings: list[str]
    packing_tried: bool


def check_all(config: TrainConfig, folder: Path, overwrite: bool = False) -> Checked:
    """What a run of a fine-tuning file would start from; relative paths are seen from `folder`.

    overwrite: what an earlier run left in the output folder may go.
    Loads no weights and writes nothing. Raises ArgumentError, CheckpointError, DeviceError or UnsupportedModelError.
    """
    device = own_device(config.device)
    if config.gpu_experts is not None:
        check_experts(device)
    base = base_model(config, folder)
    resume = plan_output(config, base, overwrite)
    make_arguments(config, has_test=bool(config.test_datasets or config.val_set_size))
    if Path(base).is_dir() and find_gguf(base) is None:
        check_folder(Path(base))
    check_reporting(config.report_to)
    check_model(config, base, device)
    packing_tried = not config.sample_packing or check_packing(base, config.trust_remote_code, device)
    tokenizer = load_tokenizer(config, base, folder)
    train, test, found = load_datasets(config, folder, tokenizer)
    findings = [line for each in found for line in each.lines(config.sequence_len)]
    return Checked(base, resume, tokenizer, train, test, findings, packing_tried)


def base_model(config: TrainConfig, folder: Path) -> str:
    """The model's folder or GGUF file, or its Hugging Face id."""
    found = locate(config.base_model, folder)
    return str(found) if found else config.base_model


def check_reporting(names: list[str]) -> None:
    """Raises ArgumentError for a place to report to that Transformers does not know or that is not installed."""
    available = get_available_reporting_integrations()
    for name in names:
        if name not in (*available, "all"):
            found = ", ".join(available) or "none"
            raise ArgumentError(f"report_to: {name} is not installed (found {found}): pip install {name}")
