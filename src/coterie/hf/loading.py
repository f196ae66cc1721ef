"""coterie.from_pretrained: a causal LM with packed experts, from a plain, a quantised or a packed checkpoint."""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from coterie.checkpoints.folder import PACKED_INDEX, Folder, read_json
from coterie.checkpoints.gguf import GgufReader
from coterie.checkpoints.gguf_file import GgufFile, find_gguf
from coterie.checkpoints.packed import UNFINISHED
from coterie.checkpoints.packed_formats import OWN
from coterie.checkpoints.quantised import unread
from coterie.errors import ArgumentError, CheckpointError, UnsupportedModelError
from coterie.gpu.device import usable
from coterie.gpu.room import CONTEXT
from coterie.hf.config import LOADING, METHOD, CoterieConfig
from coterie.hf.empty import empty_model
from coterie.hf.gguf.config import read_config
from coterie.hf.gguf.weights import fetch_gguf, kept_tensors, rest_weights
from coterie.hf.linears import kept_linears
from coterie.hf.quantizer import device_of

# What finds the files of a config finds those of its model too.
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
BOTH = (*HUB, "trust_remote_code", "code_revision")
# The model's alone, though a config would take them.
MODEL = ("dtype", "torch_dtype", "adapter_kwargs")


def from_pretrained(
    path_or_id: str | os.PathLike,
    experts: str | None = None,
    device: str | torch.device = "cpu",
    *,
    group_size: int | None = None,
    zero_point: bool | None = None,
    scale_search: bool = True,
    mmap: bool = False,
    activations: str = "auto",
    gpu_experts: Any = None,
    gpu_context: int = CONTEXT,
    dense: str | None = OWN,
    dense_skip: Sequence[str] | str = (),
    auto_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads any Transformers causal LM that has experts, with its experts packed, in CPU memory or on a GPU.

    path_or_id: a checkpoint folder, a GGUF file (or the folder of one) or a Hugging Face id; plain (bf16, fp16, f32:
        packed while it streams in), quantised (FP8, MXFP4, NVFP4, GPTQ, GGUF's types ...: experts and linear layers
        keep their codes where a format holds them, the rest is dequantised), or packed before (by `save_pretrained` or
        `coterie convert cpu`: opened as it is).
    experts: a format, "int4" say. The default is int4 for a plain checkpoint, for a quantised one its own. For a packed
        checkpoint leave it out.
    device: where all but the experts goes, "cuda" for instance, which needs accelerate. `device_map` says the same.
    group_size, zero_point, scale_search: as in CoterieConfig; for checkpoints that are not packed.
    mmap: use a packed checkpoint's experts where they lie on disk, instead of copying them into huge pages.
    activations: what int8 and int4 experts and linear layers compute with: "auto", "bf16" or "int8"; see `Experts`.
    gpu_experts: with device="cuda", which experts are there too instead of in RAM: "all", a number of each layer's, a
        fraction in (0, 1], a bool mask [layers, experts], or "auto": as many as there is room for; or "stream", which
        sends them there for calls of many tokens; see CoterieConfig.
    gpu_context: tokens of the KV cache that "auto" leaves room for.
    dense, dense_skip: the format that linear layers outside the experts are packed in, "int8" say, and regular
        expressions for those that are not. The default, "own", keeps the codes of those that are quantised, and packs
        no others; None packs none, so that they can be trained. See CoterieConfig.
    auto_class: what loads the model, for other heads than causal LM.
    gguf_file: the name of a GGUF file in that folder or of that id.
    Other arguments are those of `auto_class.from_pretrained`: settings of the config, `revision`, `subfolder`, `dtype`,
    and so on. A `config` that is given is not changed.

    Raises ArgumentError for options that do not fit, CheckpointError for a folder that is not a whole checkpoint,
    UnsupportedModelError for a model without experts or with experts that no kernel computes, DeviceError for a device
    that is not there and where there is not enough memory.
    """
    if str(device) != "cpu":
        if kwargs.get("device_map") is not None:
            raise ArgumentError(f"expected device or device_map, found both: {str(device)!r}, {kwargs['device_map']!r}")
        usable(device)
        kwargs["device_map"] = str(device)
    if "quantization_config" in kwargs:
        raise ArgumentError("quantization_config is made by coterie.from_pretrained: give experts=... instead")
    asked = CoterieConfig(
        experts, group_size, zero_point, scale_search, mmap, activations, gpu_experts, gpu_context, dense, dense_skip
    )
    if kwargs.get("gguf_file"):
        path_or_id = fetch_gguf(path_or_id, kwargs.pop("gguf_file"), {k: v for k, v in kwargs.items() if k in HUB})
    gguf = find_gguf(Path(path_or_id, kwargs.get("subfolder") or ""))
    if gguf is not None:
        return _from_gguf(gguf, asked, auto_class, kwargs)
    check_path(path_or_id, kwargs.get("subfolder") or "")
    config, kwargs = split_config(path_or_id, kwargs)
    parts = [config, config.get_text_config()]
    stored = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    if stored is None:
        return auto_class.from_pretrained(path_or_id, config=config, quantization_config=asked, **kwargs)
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(stored.get("quant_method"))
    if method != METHOD:
        if problem := unread(method, stored):
            raise UnsupportedModelError(f"{path_or_id} is quantised by {problem}; use the original checkpoint")
        for part in parts:
            vars(part).pop("quantization_config", None)
        config.dtype = config.dtype or torch.bfloat16  # Transformers would take that of the codes
        return auto_class.from_pretrained(path_or_id, config=config, quantization_config=asked, **kwargs)
    packed = CoterieConfig(**stored)
    packed.asked = asked.asked
    packed.check_asked()
    config.quantization_config = packed.to_dict() | {name: getattr(asked, name) for name in LOADING}
    return auto_class.from_pretrained(path_or_id, config=config, **kwargs)


def _from_gguf(path: Path, asked: CoterieConfig, auto_class: Any, kwargs: dict[str, Any]) -> PreTrainedModel:
    """The model of a GGUF file: Transformers makes what is not experts of its metadata and tensors."""
    file = GgufFile(path)
    asked.gguf = GgufReader(file)
    given = {name: value for name, value in kwargs.items() if name not in ("config", *MODEL, *BOTH)}
    config, unused = read_config(file, **given)
    if isinstance(kwargs.get("config"), PretrainedConfig):
        config = copy.deepcopy(kwargs["config"])
    dtype = kwargs.get("dtype", kwargs.get("torch_dtype", "auto"))
    dtype = config.dtype if dtype in (None, "auto") else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if asked.dense == OWN and device_of(kwargs.get("device_map")).type != "cpu":
        asked.dense, asked.dense_skip = None, []
    empty = empty_model(config, auto_class, dtype=dtype)
    weights = rest_weights(file, empty)
    asked.gguf.parameters = kept_tensors(weights)
    packed = {f"{name}.weight" for name in kept_linears(empty, asked.gguf.format_of, asked.dense, asked.dense_skip)}
    rest = {name: weight.dense(empty.dtype) for name, weight in weights.items() if name not in packed}
    model = type(empty).from_pretrained(
        None, config=config, state_dict=rest, quantization_config=asked, **unused | {"dtype": dtype}
    )
    model.name_or_path = model.config.name_or_path = str(path)  # by which adapters name their base
    return model


def split_config(path_or_id: str | os.PathLike, kwargs: dict[str, Any]) -> tuple[PretrainedConfig, dict[str, Any]]:
    """The config of a checkpoint, changed by those of `kwargs` that are settings of it, and the other ones."""
    kwargs = dict(kwargs)
    config = kwargs.pop("config", None)
    if isinstance(config, PretrainedConfig):
        return copy.deepcopy(config), kwargs
    kept = {name: kwargs[name] for name in (*BOTH, *MODEL) if name in kwargs}
    given = {name: value for name, value in kwargs.items() if name not in MODEL}
    config, unused = AutoConfig.from_pretrained(config or path_or_id, return_unused_kwargs=True, **given)
    return config, unused | kept


def check_path(path_or_id: str | os.PathLike, subfolder: str = "") -> None:
    """Raises CheckpointError for a folder that holds no whole checkpoint, and for a path that is no folder.

    A Hugging Face id passes: at most one slash, and no folder of that organisation's name here.
    """
    path, text = Path(path_or_id), os.fspath(path_or_id)
    if path.is_dir():
        check_folder(path / subfolder)
        return
    looks_local = not isinstance(path_or_id, str) or text.startswith(("/", ".", "~")) or text.count("/") > 1
    if path.exists():
        raise CheckpointError(f"{path} is a file, not a checkpoint folder; expected a folder or a Hugging Face id")
    if looks_local or text.endswith("/") or (path.parent != Path() and path.parent.is_dir()):
        there = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, there, n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise CheckpointError(
            f"{path} is not a checkpoint folder: it does not exist; expected a folder or a Hugging Face id{hint}"
        )


def check_folder(path: Path) -> None:
    """Raises CheckpointError unless `path` holds a config.json and whole safetensors files; nothing is loaded."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a checkpoint folder: it does not exist")
    if not any(path.iterdir()):
        raise CheckpointError(f"{path} is empty: expected config.json and safetensors files")
    if (path / UNFINISHED).exists():
        raise CheckpointError(f"{path} was not finished ({UNFINISHED} is there): save or convert it again")
    if not (path / "config.json").is_file():
        adapter = path / "adapter_config.json"
        if adapter.is_file():
            base = read_json(adapter).get("base_model_name_or_path") or "its base model"
            raise CheckpointError(
                f"{path} holds an adapter, not a model: load the model it was trained on, "
                f"model = coterie.from_pretrained({str(base)!r}), then PeftModel.from_pretrained(model, {str(path)!r})"
            )
        raise CheckpointError(f"{path} has no config.json: it is not a Hugging Face checkpoint folder")
    stored = read_json(path / "config.json").get("quantization_config")
    if isinstance(stored, dict) and stored.get("quant_method") == METHOD and not (path / PACKED_INDEX).is_file():
        raise CheckpointError(f"{path} is packed but has no {PACKED_INDEX}: save or convert it again")
    folder = Folder(path)
    for shard in folder.shards:
        folder.file(shard)
