"""The config and the tokenizer of what `coterie.from_pretrained` opens: a folder, a GGUF file or a Hugging Face id."""

from __future__ import annotations

import os
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from coterie.checkpoints.gguf_file import GgufFile, find_gguf
from coterie.hf.gguf import config as gguf_config

OF_FOLDERS = ("revision", "trust_remote_code")  # what a file has no use for


def load_config(path_or_id: str | os.PathLike, **settings: Any) -> PretrainedConfig:
    """The config of a model, changed by `settings`. Raises what Transformers does, and of a GGUF file what
    `gguf_config.read_config` does."""
    file = find_gguf(path_or_id)
    if file is None:
        return AutoConfig.from_pretrained(path_or_id, **settings)
    own = {name: value for name, value in settings.items() if name not in OF_FOLDERS}
    return gguf_config.read_config(GgufFile(file), **own)[0]


def load_tokenizer(path_or_id: str | os.PathLike, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a model. Raises what Transformers does, and CheckpointError for a GGUF file without one."""
    file = find_gguf(path_or_id)
    if file is None:
        return AutoTokenizer.from_pretrained(path_or_id, **options)
    return gguf_config.open_tokenizer(GgufFile(file))
