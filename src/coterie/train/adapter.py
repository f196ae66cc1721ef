"""The adapter of a fine-tuning file: a new one, or one to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict, load_peft_weights, peft_model

from coterie.checkpoints.folder import read_json
from coterie.errors import ArgumentError
from coterie.train.config import TrainConfig

ADAPTER = "adapter_config.json"
# What a file says of an adapter, and what adapter_config.json calls it.
LORA_KEYS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters",
    "peft_use_rslora": "use_rslora",
}


def add_adapter(model: Any, config: TrainConfig, task: str, unfrozen: list[str]) -> Any:
    """The model with a new adapter, the modules of `unfrozen` trained beside it."""
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules or None,
        target_parameters=config.lora_target_parameters or None,
        use_rslora=config.peft_use_rslora,
        modules_to_save=sorted(modules_of(unfrozen)) or None,
        task_type=task,
    )
    try:
        return get_peft_model(model, lora)
    except ValueError as error:
        raise ArgumentError(f"adapter: {error}") from error


def load_adapter(model: Any, path: str, task: str, unfrozen: list[str]) -> Any:
    """The model with an adapter to go on training, for this task, the modules of `unfrozen` trained beside it.

    Raises ArgumentError for one that does not fit.
    """
    lora = PeftConfig.from_pretrained(path)
    lora.task_type, lora.inference_mode = task, False
    lora.modules_to_save = sorted({*(lora.modules_to_save or ()), *modules_of(unfrozen)}) or None
    try:
        model = get_peft_model(model, lora)
        # What is trained beside it and was not before begins as the model has it.
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        beside = {name: tensor for name, tensor in own.items() if "lora_" not in name}
        peft_model.set_peft_model_state_dict(model, {**beside, **load_peft_weights(path, device="cpu")})
        return model
    except (ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()
        raise ArgumentError(f"lora_model_dir: {path} does not fit the model: {' '.join(first[:2])}") from error


def modules_of(parameters: list[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in parameters}


def check_keys(config: TrainConfig) -> None:
    """Raises ArgumentError where `lora_model_dir` holds no LoRA, or another than the file's own keys describe."""
    if not config.lora_model_dir:
        return
    file = Path(config.lora_model_dir) / ADAPTER
    if not file.is_file():
        raise ArgumentError(f"lora_model_dir: {file.parent} has no {ADAPTER}; expected the folder of an adapter")
    adapter = read_json(file)
    if adapter.get("peft_type") != "LORA":
        raise ArgumentError(f"lora_model_dir: {file.parent} is {adapter.get('peft_type')}; expected a LoRA")
    for key, name in LORA_KEYS.items():
        asked, found = getattr(config, key), adapter.get(name)
        if key in config.given and comparable(asked) != comparable(found):
            raise ArgumentError(
                f"{key}: {asked}, but the adapter in lora_model_dir ({file.parent}) has {found}, and goes on with it: "
                f"leave {key} out, or train a new adapter"
            )


def comparable(value: Any) -> Any:
    """Names in no order, and one nothing for all there are."""
    return (frozenset(value) if isinstance(value, list) else value) or None
