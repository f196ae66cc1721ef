"""A model, its tokenizer and its adapters, opened to generate text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from coterie.checkpoints.gguf import PLAIN_TORCH
from coterie.checkpoints.gguf_file import GgufFile, find_gguf
from coterie.checkpoints.packed_formats import NONE, OWN
from coterie.errors import ArgumentError, CheckpointError
from coterie.hf.described import load_config, load_tokenizer
from coterie.hf.loading import from_pretrained

SMALL = 32  # rows or columns


def open_model(
    path_or_id: str, adapters: Mapping[str, Path], *, dense: str = "auto", device: str = "cpu", **options: Any
) -> tuple[Any, dict[str | None, PreTrainedTokenizerBase]]:
    """(the model, the tokenizer of each adapter by name, and of the model alone by None).

    With adapters the model is a PeftModel whose first one is active. An adapter that has a tokenizer beside it, with
    another chat template maybe, is to be used with that.
    dense: see `dense_format`; options: those of `coterie.from_pretrained`, whose errors are raised. Raises
    CheckpointError where there is no tokenizer and ArgumentError for an adapter that cannot be loaded. Adapters need
    PEFT.
    """
    for name, folder in adapters.items():
        if not (folder / "adapter_config.json").is_file():
            raise ArgumentError(f"adapter {name}: expected the folder of a PEFT adapter, found none at {folder}")
    packed = dense_format(path_or_id, dense, device)
    model = from_pretrained(path_or_id, dense=packed, device=device, **options)
    base = open_tokenizer(path_or_id)
    tokenizers: dict[str | None, PreTrainedTokenizerBase] = {None: base}
    for number, (name, folder) in enumerate(adapters.items()):
        from peft import PeftModel

        if number == 0:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
        else:
            model.load_adapter(folder, adapter_name=name)
        tokenizers[name] = open_tokenizer(folder) if (folder / "tokenizer_config.json").is_file() else base
    return model.eval(), tokenizers


def dense_format(path_or_id: str, asked: str, device: str) -> str | None:
    """The format that linear layers outside the experts are to be packed in; None: none, or as the checkpoint has them.

    asked: a format, "own", "none", or "auto": for a model on the CPU, where torch's products of one row are slow, int8,
    and of a GGUF file that has them all quantised its own.
    """
    if asked != "auto":
        return None if asked == NONE else asked
    if device != "cpu":
        return None
    if gguf := find_gguf(path_or_id):
        return OWN if _has_all_quantised(GgufFile(gguf)) else "int8"
    try:
        stored = getattr(load_config(path_or_id), "quantization_config", None) or {}
    except (OSError, ValueError):  # what opening the model will refuse
        stored = {}
    return None if dict(stored).get("dense") else "int8"


def _has_all_quantised(file: GgufFile) -> bool:
    """Whether no linear layer of a GGUF file, but routers and what is small, has plain numbers."""
    matrices = [name for name in file.names if len(file.shape(name)) == 2 and min(file.shape(name)) >= SMALL]
    head = "output.weight" if "output.weight" in file.names else "token_embd.weight"
    linear = [name for name in matrices if name == head or (name.startswith("blk.") and "ffn_gate_inp" not in name)]
    return not any(file.type(name) in PLAIN_TORCH for name in linear)


def open_tokenizer(path_or_id: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint. Raises CheckpointError where there is none."""
    try:
        return load_tokenizer(path_or_id)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path_or_id}: expected a tokenizer beside the model, found none ({reason})") from error


def context_length(model: Any) -> int | None:
    """Tokens that a model was made for, prompt and answer together; None where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
