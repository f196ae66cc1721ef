"""The config and the tokenizer of a GGUF file, made of its metadata: by Transformers, or here where that does not."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from coterie.checkpoints.gguf_file import GgufFile
from coterie.checkpoints.tensorfile import shown
from coterie.errors import CheckpointError, CoterieError, UnsupportedModelError
from coterie.hf.gguf.families import family_of
from coterie.hf.gguf.family import settings_of

# Metadata that Transformers does not read of every architecture -> what its configs call it.
FIELDS = {
    "attention.key_length": "head_dim",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
}
LAYERS = 1 << 10  # more than any model has, so that longer lists of metadata are not a config's
ENDS = ("eos", "eot", "eom")  # of an answer, of a turn, of a message: each ends what a model says


def read_config(file: GgufFile, **settings: Any) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config that a file's metadata makes, changed by those of `settings` that are its own, and the other ones.

    Raises UnsupportedModelError, naming the architecture, where neither Transformers nor this version makes one.
    """
    _check_blocks(file)
    family = family_of(file)
    if family is not None:
        if family.model_type not in CONFIG_MAPPING:
            raise UnsupportedModelError(
                f"{file.path}: GGUF architecture {shown(file.architecture)} opens as {family.model_type}, which "
                f"Transformers {transformers.__version__} does not know: a newer one does"
            )
        try:
            made, values = CONFIG_MAPPING[family.model_type], settings_of(file, family)
            config, unused = made.from_dict(values, return_unused_kwargs=True, **settings)
        except CoterieError:
            raise
        except Exception as error:  # of values that are no numbers, and Transformers' own checks: of no common type
            raise CheckpointError(
                f"{file.path}: the metadata is no valid {family.model_type} config: {error}"
            ) from error
    else:
        _check_positions(file, settings)
        config, unused = _by_transformers(file, settings)
    ends = [file.value(f"tokenizer.ggml.{end}_token_id") for end in ENDS]
    if odd := [end for end in ends if type(end) not in (int, type(None))]:
        raise CheckpointError(f"{file.path}: a text ends with token {shown(odd[0])}, expected a number")
    ends = [end for end in dict.fromkeys(ends) if end is not None]
    if ends and "eos_token_id" not in settings:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    config.tie_word_embeddings = "output.weight" not in file.names  # which may be in another file than the metadata
    config.dtype = config.dtype or torch.bfloat16
    return config, unused


def _check_positions(file: GgufFile, settings: dict[str, Any]) -> None:
    scaling = file.own_value("rope.scaling.type", "none")
    if scaling != "none" and "rope_parameters" not in settings:
        raise UnsupportedModelError(
            f"{file.path}: positions are scaled ({shown(scaling)}), which this version does not read of GGUF files: "
            "give rope_parameters=... as the original's config.json has them, or use the original checkpoint"
        )


def _by_transformers(file: GgufFile, settings: dict[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    try:
        with _metadata_of(file) as made:
            config, unused = AutoConfig.from_pretrained(
                made.parent, gguf_file=made.name, return_unused_kwargs=True, **settings
            )
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{file.path}: Transformers {transformers.__version__} does not open GGUF architecture "
            f"{shown(file.architecture)}: {shown(str(error))}; use the original checkpoint, or Experts.open for a layer"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{file.first}: Transformers does not read its metadata: {shown(str(error))}") from error
    unused.pop("gguf_file", None)
    config.name_or_path = str(file.first.parent)
    for key, name in FIELDS.items():
        value = file.own_value(key)
        if value is not None and hasattr(config, name) and name not in settings:
            setattr(config, name, value)
    return config, unused


@contextmanager
def _metadata_of(file: GgufFile) -> Iterator[Path]:
    """A file of the metadata but the vocabulary, of which it has the size: Transformers takes as many seconds to read
    one as it has tens of thousands of tokens. Gone afterwards."""
    tokens, key = file.count("tokenizer.ggml.tokens"), f"{file.architecture}.vocab_size"
    more = {} if tokens is None or file.value(key) is not None else {key: tokens}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "metadata.gguf")
        made.write_bytes(file.metadata(LAYERS, **more))
        yield made


def open_tokenizer(file: GgufFile) -> Any:
    """The tokenizer of a file. Raises CheckpointError where there is none, or none that Transformers can make."""
    first = file.first
    if file.value("tokenizer.ggml.model") is None:
        raise CheckpointError(f"{first} has no tokenizer: expected tokenizer.ggml.model and what goes with it")
    _check_blocks(file)
    kind = _by_transformers(file, {})[0].model_type if family_of(file) is None else None
    try:
        if not TOKENIZER_MAPPING_NAMES.get(kind or ""):
            return PreTrainedTokenizerFast.from_pretrained(first.parent, gguf_file=first.name)
        return AutoTokenizer.from_pretrained(first.parent, gguf_file=first.name, tokenizer_type=kind)
    except Exception as error:  # tokenizers fail in as many ways as there are kinds
        raise CheckpointError(f"{first}: Transformers makes no tokenizer of it: {shown(str(error))}") from error


def save_tokenizer(file: GgufFile, folder: str | os.PathLike) -> None:
    """Writes the tokenizer of a file, where it has one, into `folder`."""
    if file.value("tokenizer.ggml.model") is not None:
        open_tokenizer(file).save_pretrained(folder)


def _check_blocks(file: GgufFile) -> None:
    """Raises CheckpointError for more layers than a file can hold: configs have lists of as many."""
    blocks = file.own_value("block_count", 0)
    if not isinstance(blocks, int) or blocks > len(file.names):
        raise CheckpointError(f"{file.path}: {shown(blocks)} layers (block_count), and {len(file.names)} tensors")
