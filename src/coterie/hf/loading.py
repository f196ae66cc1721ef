"""coterie.from_pretrained: a causal LM with packed experts, from a plain or from a packed checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from coterie.checkpoints.folder import Folder, read_json
from coterie.errors import ArgumentError, CheckpointError, UnsupportedModelError
from coterie.hf.config import METHOD, CoterieConfig

HUB_OPTIONS = ("trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "force_download")


def from_pretrained(
    path_or_id: str | os.PathLike,
    experts: str | None = None,
    device: str | torch.device = "cpu",
    *,
    group_size: int | None = None,
    zero_point: bool | None = None,
    scale_search: bool = True,
    mmap: bool = False,
    auto_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads any Transformers causal LM that has experts, with its experts packed in CPU memory.

    path_or_id: a checkpoint folder or a Hugging Face id; plain (bf16, fp16, f32: packed while it streams in), or packed
        before (by `save_pretrained` or `coterie convert cpu`: opened as it is).
    experts: "int4" (the default for a plain checkpoint), "int8" or "bf16". For a packed checkpoint leave it out.
    group_size, zero_point, scale_search: as in CoterieConfig; for plain checkpoints.
    mmap: use a packed checkpoint's experts where they lie on disk, instead of copying them into huge pages.
    auto_class: what loads the model, for other heads than causal LM.
    Other arguments go to `auto_class.from_pretrained`.

    Raises ArgumentError for options that do not fit, CheckpointError for a folder that is not a whole checkpoint,
    UnsupportedModelError for a model without experts or with experts that no kernel computes.
    """
    if torch.device(device).type != "cpu":
        raise ArgumentError(f"device={str(device)!r}: coterie computes on the CPU, use device='cpu'")
    if "quantization_config" in kwargs:
        raise ArgumentError("quantization_config is made by coterie.from_pretrained: give experts=... instead")
    path = Path(path_or_id)
    if path.is_dir():
        check_folder(path)
    elif path.exists() or path.is_absolute() or str(path_or_id).startswith("."):
        raise CheckpointError(f"{path} is not a checkpoint folder; expected a folder or a Hugging Face id")
    hub = {key: kwargs[key] for key in HUB_OPTIONS if key in kwargs}
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(path_or_id, **hub)
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        asked = CoterieConfig(experts or "int4", group_size, bool(zero_point), scale_search)
        if mmap:
            raise ArgumentError(
                "mmap=True needs a packed checkpoint, which this is not: `coterie convert cpu` it first"
            )
        return auto_class.from_pretrained(path_or_id, config=config, quantization_config=asked, **kwargs)
    stored = dict(stored)
    if stored.get("quant_method") != METHOD:
        raise UnsupportedModelError(
            f"{path_or_id} is quantised by {stored.get('quant_method')}; expected a bf16, fp16 or f32 checkpoint, "
            "or one that coterie packed"
        )
    packed = CoterieConfig(**{**stored, "mmap": mmap})
    for name, value in (("experts", experts), ("group_size", group_size), ("zero_point", zero_point)):
        if value is not None and value != getattr(packed, name):
            raise ArgumentError(
                f"{name}={value!r}, but {path_or_id} is already packed with {name}={getattr(packed, name)!r}: "
                "leave it out, or start from the original checkpoint"
            )
    config.quantization_config = {**packed.to_dict(), "mmap": mmap}
    if not path.is_dir():
        # The index names the rest of the model alone, so Transformers would not fetch the experts' files.
        path_or_id = snapshot_download(str(path_or_id), **{k: v for k, v in hub.items() if k != "trust_remote_code"})
    return auto_class.from_pretrained(path_or_id, config=config, **kwargs)


def check_folder(path: Path) -> None:
    """Raises CheckpointError unless `path` holds a config.json and whole safetensors files; nothing is loaded."""
    if not any(path.iterdir()):
        raise CheckpointError(f"{path} is empty: expected config.json and safetensors files")
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} has no config.json: it is not a Hugging Face checkpoint folder")
    read_json(path / "config.json")
    folder = Folder(path)
    for shard in folder.shards:
        folder.file(shard)
