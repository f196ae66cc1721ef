"""Merging an adapter into its base model: a plain checkpoint in the base's dtype, or a packed one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from transformers import PreTrainedModel

from coterie.adapters.base import open_packed, open_plain
from coterie.adapters.empty import Adapted, adapt_empty
from coterie.adapters.folder import WEIGHTS, base_of, copy, local, read_adapter_config
from coterie.adapters.stream import StreamedMerge
from coterie.checkpoints.folder import Folder, read_json
from coterie.checkpoints.folderwriter import new_folder
from coterie.checkpoints.packed_formats import OWN
from coterie.checkpoints.tensorwriter import write_text
from coterie.convert import convert_cpu
from coterie.convert.linears import Dense, stored_linears
from coterie.convert.rest import other_files
from coterie.errors import ArgumentError
from coterie.formats import resolve
from coterie.hf.config import METHOD
from coterie.hf.loading import check_folder
from coterie.hf.names import tied_names

TEMPLATE = r"(additional_chat_templates/.*|chat_template\..*)"
TOKENIZER = (
    rf"{TEMPLATE}|(tokenizer|vocab|merges|special_tokens_map|added_tokens|spiece|sentencepiece).*\.(json|txt|model)"
)
PROCESSOR = r"(video_)?(pre)?processor_config\.json"


@dataclass(frozen=True)
class Merged:
    """What was written. Errors are relative (Frobenius norms), of the worst expert, and of the worst linear layer."""

    experts: int
    format: str
    rounding_error: float
    quantisation_error: float
    linears: str | None = None
    linear_error: float = 0.0


def merge_adapter(adapter: Path, output: Path, model: str | None = None, experts: str = "bf16") -> Merged:
    """Writes the merged model to a new folder: `experts` "bf16" a plain checkpoint, "int8" or "int4" a packed one.

    The base, plain or packed, is read and written an expert or a module at a time; every tensor that the adapter does
    not change is copied. Where experts are packed, so are the linear layers that a packed base has packed. A tokenizer
    or chat template in the adapter's folder takes the place of the base's.
    Raises ArgumentError for an adapter that does not fit, CheckpointError for damaged files.
    """
    resolve(experts)
    lora = read_adapter_config(adapter)
    name, revision = base_of(adapter, lora, model)
    folder = local(name, revision)
    packed = check_base(folder, name)
    adapted = adapt_empty(str(folder), None, lora, load_file(adapter / WEIGHTS))
    if packed:
        base = open_packed(folder, adapted.own, adapted.layouts)
    else:
        base = open_plain(folder, adapted.layouts, set(adapted.experts()))
    merge = StreamedMerge(base, adapted)
    with new_folder(output) as made:
        plain = made if experts == "bf16" else made / "plain"
        plain.mkdir(exist_ok=True)
        worst = merge.write(plain)
        write_config(folder, plain, adapted, merge.untied)
        copy_others(folder, adapter, plain)
        if experts == "bf16":
            return Merged(merge.parameters, experts, worst, 0.0)
        dense = packed_again(folder, adapted.plain)
        report = convert_cpu(plain, made / "packed", experts, dense=dense)
        for file in (made / "packed").iterdir():
            file.replace(made / file.name)
        (made / "packed").rmdir()
        shutil.rmtree(plain)
    quantised = max(error.worst for error in report.errors.values())
    if dense is None or report.linear_errors is None:
        return Merged(merge.parameters, experts, worst, quantised)
    return Merged(merge.parameters, experts, worst, quantised, dense.name, report.linear_errors.worst)


def packed_again(base: Path, model: PreTrainedModel) -> Dense | None:
    """Linear layers packed as those of the checkpoint `base` are, of which `model` is; None where they are not."""
    linears = stored_linears(Folder(base), "F32")
    if not linears:
        return None
    tied = tied_names(model)

    def tensors(names: Collection[str]) -> dict[str, str]:
        found = {name: name if name in names else tied.get(name, "") for name in linears}
        return {name: tensor for name, tensor in found.items() if tensor in names}

    stored = read_json(base / "config.json")["quantization_config"]
    own = {name: linear.file.layout.spec for name, linear in linears.items()}
    spec = None if stored.get("dense") == OWN else next(iter(own.values()))
    return Dense(spec, tuple(stored.get("dense_skip", ())), tensors, own)


def check_base(folder: Path, name: str) -> bool:
    """Whether the base is packed by coterie. Raises ArgumentError or CheckpointError for one that cannot be merged."""
    check_folder(folder)
    found = read_json(folder / "config.json").get("quantization_config")
    method = found.get("quant_method") if isinstance(found, dict) else None
    if found is not None and method != METHOD:
        raise ArgumentError(f"{name} is quantised by {method}; merge into the original model")
    return found is not None


def write_config(folder: Path, output: Path, adapted: Adapted, untied: bool) -> None:
    """The base's config.json, without what the merged model is no longer: packed, tied, without a classifier."""
    config = read_json(folder / "config.json")
    before = json.dumps(config)
    config.pop("quantization_config", None)
    if untied:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    if adapted.classifies:
        made = adapted.plain.config
        config |= {
            "architectures": [type(adapted.plain).__name__],
            "id2label": {str(number): label for number, label in made.id2label.items()},
            "label2id": made.label2id,
        }
    if json.dumps(config) == before:
        copy(folder / "config.json", output / "config.json")
    else:
        write_text(output / "config.json", json.dumps(config, indent=2) + "\n")


def copy_others(folder: Path, adapter: Path, output: Path) -> None:
    """Copies what is neither weights nor config.json: of the tokenizer, the adapter's files where it has any."""
    own = [name for name in other_files(adapter) if re.fullmatch(rf"{TOKENIZER}|{PROCESSOR}", name)]
    if "tokenizer_config.json" in own:
        replaced = TOKENIZER
    else:
        replaced = TEMPLATE if any(re.fullmatch(TEMPLATE, name) for name in own) else r"(?!)"
    for name in other_files(folder):
        if not re.fullmatch(replaced, name):
            copy(folder / name, output / name)
    for name in own:
        copy(adapter / name, output / name)
