"""The model of a fine-tuning file without its weights: what its names match, said before anything is loaded."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from coterie.checkpoints.gguf import GgufReader
from coterie.checkpoints.gguf_file import GgufFile, find_gguf
from coterie.checkpoints.packed_formats import ModelFormats
from coterie.convert.cpu import formats_for
from coterie.errors import ArgumentError, UnsupportedModelError
from coterie.gpu.choice import chosen
from coterie.hf import CoterieConfig
from coterie.hf.adapter_fit import check_adapter
from coterie.hf.config import METHOD
from coterie.hf.described import load_config
from coterie.hf.empty import empty_model
from coterie.hf.modules import formats_by_name, read_layouts
from coterie.hf.room import choose
from coterie.train.adapter import add_adapter, check_keys
from coterie.train.config import ALL_LINEAR, ATTENTION, TrainConfig
from coterie.train.model import find_unfrozen, kind_of_model

ADAPTER = "default"


def check_model(config: TrainConfig, base: str, device: torch.device) -> None:
    """Builds the model of `base`'s config.json on the meta device, and looks for all that the file names in it.

    Raises UnsupportedModelError for a model without experts or with experts that cannot be computed, ArgumentError for
    names that match nothing, adapters that do not fit and experts that there are not, DeviceError where `device` has
    too little memory for what is to be there.
    """
    auto_class, task, changes = kind_of_model(config)
    trust = {"trust_remote_code": config.trust_remote_code}
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    described = load_config(base, **trust, **changes)
    try:
        model = empty_model(described, auto_class, dtype=dtype, **trust)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{base} cannot be fine-tuned: {error}") from error
    layouts = read_layouts(model)
    experts = tuple(f"{path}.{name}" for path, layout in layouts.items() for name in layout.parameters)
    unfrozen = find_unfrozen(model, config.unfrozen_parameters, experts)
    packing = packed_as(config, base, described)
    if packing is None:
        chosen(config.gpu_experts, [layout.num_experts for layout in layouts.values()])
    else:
        formats = formats_by_name(packing, list(layouts))
        choose(config.gpu_experts, config.sequence_len, model, layouts, formats, device)
    if config.adapter and config.lora_model_dir:
        check_keys(config)
        check_fit(model, config.lora_model_dir)
    elif config.adapter:
        check_targets(config, model)
        with torch.device("meta"):
            add_adapter(model, config, task, unfrozen)


def packed_as(config: TrainConfig, base: str, described: Any) -> ModelFormats | None:
    """The formats that the experts of a plain or packed checkpoint, or of a GGUF file, will have; None of others, whose
    files say it. Raises CheckpointError for a GGUF file that is not whole."""
    gguf = find_gguf(base)
    if gguf is not None:
        reader = GgufReader(GgufFile(gguf))
        layers = {layer: reader.layer(layer) for layer in reader.layers}
        return formats_for(layers, config.experts, config.group_size, config.zero_point)
    parts = described, described.get_text_config()
    stored = next((found for part in parts if (found := getattr(part, "quantization_config", None))), None)
    if stored is None:
        return CoterieConfig(config.experts or "int4", config.group_size, config.zero_point).packing
    stored = stored if isinstance(stored, dict) else stored.to_dict()
    return CoterieConfig(**stored).packing if stored.get("quant_method") == METHOD else None


def check_targets(config: TrainConfig, model: nn.Module) -> None:
    """Raises ArgumentError for a name of lora_target_modules or lora_target_parameters that matches nothing.

    Of the names that are there by default, one is enough: not every model has all of them.
    """
    name = type(model).__name__
    modules = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if config.lora_target_modules != ALL_LINEAR:
        wanted = list(config.lora_target_modules)
        missing = [each for each in wanted if not any(matches(path, each) for path in modules)]
        if missing and (wanted != ATTENTION or missing == wanted):
            raise ArgumentError(
                f"lora_target_modules: {' and '.join(missing)} match{'es' * (len(missing) == 1)} no linear layer of "
                f"{name}; {nearest(missing[0], modules)}"
            )
    parameters = [path for path, parameter in model.named_parameters() if parameter.ndim > 1]
    for wanted in config.lora_target_parameters:
        if not any(matches(path, wanted) for path in parameters):
            raise ArgumentError(
                f"lora_target_parameters: {wanted} matches no parameter of {name}; "
                f"{nearest(wanted, [path for path in parameters if 'expert' in path] or parameters)}"
            )


def matches(path: str, wanted: str) -> bool:
    """Whether PEFT takes `wanted` for the module or parameter at `path`."""
    return path == wanted or path.endswith(f".{wanted}")


def nearest(wanted: str, paths: list[str]) -> str:
    """Up to three names like `wanted` among the ends of `paths`; where none is like it, what there is."""
    parts = wanted.count(".") + 1
    ends = list(dict.fromkeys(".".join(path.split(".")[-parts:]) for path in paths))
    near = difflib.get_close_matches(wanted, ends, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"there is {', '.join(ends[:12])}"


def check_fit(model: nn.Module, folder: str) -> None:
    """Raises ArgumentError where the adapter in lora_model_dir is damaged, or one of another model."""
    file = Path(folder) / "adapter_model.safetensors"
    if not file.is_file():
        raise ArgumentError(f"lora_model_dir: {folder} has no adapter_model.safetensors")
    try:
        stored: dict[str, Any] = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ArgumentError(f"lora_model_dir: {file} is damaged ({error})") from None
    lora = LoraConfig.from_pretrained(folder)
    lora.task_type = None  # which need not be the file's: the head of another begins as the model has it
    try:
        with torch.device("meta"):
            adapted = get_peft_model(model, lora)
        check_adapter(adapted, ADAPTER, stored, type(model).__name__)
    except ValueError as error:
        raise ArgumentError(f"lora_model_dir: {folder} does not fit the model: {error}") from error
