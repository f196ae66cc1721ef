"""Keys of axolotl's files that are written otherwise here, have no meaning here, or cannot be had."""

from __future__ import annotations

import logging
from typing import Any

from coterie.errors import ArgumentError

logger = logging.getLogger(__name__)

RENAMED = {"dpo_beta": "rl_beta", "chat_template_jinja": "chat_template"}

ATTENTION = "attention is PyTorch's own"
KERNELS = "it names kernels that are not used here"
READ_OFF = "it is read off the checkpoint"
SHARDING = "models are sharded over GPUs by it; here each process of torchrun trains on its share of a step"
UPLOAD = "nothing is uploaded: `hf upload` output_dir afterwards"

# key -> (whether a run goes on without it, why). Off (null, false, 0, empty) they are all accepted in silence.
WITHOUT_MEANING: dict[str, tuple[bool, str]] = {
    **dict.fromkeys(
        (
            "flash_attention",
            "sdp_attention",
            "xformers_attention",
            "flex_attention",
            "eager_attention",
            "attn_implementation",
        ),
        (True, ATTENTION),
    ),
    **dict.fromkeys(
        (
            "lora_mlp_kernel",
            "lora_qkv_kernel",
            "lora_o_kernel",
            "unsloth_lora_mlp",
            "unsloth_lora_qkv",
            "unsloth_lora_o",
            "unsloth_cross_entropy_loss",
            "liger_rope",
            "liger_rms_norm",
            "liger_swiglu",
            "liger_glu_activation",
            "liger_layer_norm",
            "liger_fused_linear_cross_entropy",
            "cut_cross_entropy",
            "tf32",
        ),
        (True, KERNELS),
    ),
    **dict.fromkeys(
        ("model_type", "tokenizer_type", "is_llama_derived_model", "is_qwen_derived_model"), (True, READ_OFF)
    ),
    "strict": (True, "unknown keys are always refused"),
    "dataset_prepared_path": (True, "tokenised rows are kept where the datasets library keeps its files"),
    "pad_to_sequence_len": (True, "rows are padded to the longest beside them"),
    "eval_sample_packing": (True, "it changes no loss"),
    "save_safetensors": (True, "weights are always safetensors"),
    "gradient_checkpointing_kwargs": (True, "gradient_checkpointing says all"),
    "lora_on_cpu": (True, "adapters of experts are where the experts are"),
    "low_cpu_mem_usage": (True, "experts are packed one by one"),
    "dataloader_num_workers": (True, "rows are tokenised before training"),
    "dataloader_pin_memory": (True, "rows are next to nothing beside a step"),
    "dataloader_prefetch_factor": (True, "rows are tokenised before training"),
    "loss_watchdog_threshold": (True, "a loss is only shown"),
    "loss_watchdog_patience": (True, "a loss is only shown"),
    "debug": (True, "nothing is printed by it"),
    **dict.fromkeys(
        (
            "deepspeed",
            "fsdp",
            "fsdp_config",
            "fsdp_version",
            "tensor_parallel_size",
            "context_parallel_size",
            "sequence_parallel_degree",
            "expert_parallel_size",
        ),
        (False, SHARDING),
    ),
    **dict.fromkeys(("hub_model_id", "hub_strategy", "push_dataset_to_hub", "push_to_hub"), (False, UPLOAD)),
    "fp16": (False, "models compute in bf16, or with bf16: false in float32"),
    "s2_attention": (False, ATTENTION),
    "plugins": (False, "axolotl's plugins are its own; leave out those that only bring kernels for GPUs"),
    "torch_compile": (False, "training is not compiled"),
    "special_tokens": (False, "the tokenizer's own tokens are used; change them in the checkpoint"),
    "tokens": (False, "adding tokens changes the checkpoint; do it there"),
    "lora_modules_to_save": (False, "what is trained in full is named by unfrozen_parameters, as regular expressions"),
    "lora_fan_in_fan_out": (False, "no model with experts has such layers"),
    **dict.fromkeys(
        ("peft_use_dora", "lora_use_dora"), (False, "experts are adapted by LoRA; peft_use_rslora is there")
    ),
    **dict.fromkeys(
        ("peft_layers_to_transform", "lora_layers_to_transform"),
        (False, "name the layers in lora_target_modules, as in layers.3.self_attn.q_proj"),
    ),
    **dict.fromkeys(("relora", "relora_steps", "jagged_restart_steps"), (False, "ReLoRA is not here")),
    "early_stopping_patience": (False, "runs are not stopped early; eval_steps and save_steps keep checkpoints"),
    "group_by_length": (False, "use sample_packing"),
    "neftune_noise_alpha": (False, "noise on embeddings is not here"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), (False, "eval_steps says when; by default every epoch")),
    "save_strategy": (False, "save_steps says when"),
    "evals_per_epoch": (False, "give eval_steps; without it, once an epoch"),
    "saves_per_epoch": (False, "give save_steps"),
    **dict.fromkeys(
        ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args"), (False, "optimizers have their own defaults here")
    ),
    **dict.fromkeys(("lr_scheduler_kwargs", "cosine_min_lr_ratio"), (False, "schedules have their own defaults here")),
}
FINE = {  # what says the same as leaving the key out
    "evals_per_epoch": (1,),
    "saves_per_epoch": (1,),
    "eval_strategy": ("epoch", "steps", "no"),
    "evaluation_strategy": ("epoch", "steps", "no"),
    "save_strategy": ("epoch", "steps"),
    "tensor_parallel_size": (1,),
    "context_parallel_size": (1,),
    "sequence_parallel_degree": (1,),
    "expert_parallel_size": (1,),
}


def translate(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The mapping of a file in coterie's keys. Raises ArgumentError for what cannot be had, naming the key and why.

    A key without a meaning here is left out, and said once.
    """
    kept = {}
    for name, value in values.items():
        if name not in WITHOUT_MEANING:
            kept[RENAMED.get(name, name)] = value
            continue
        goes_on, reason = WITHOUT_MEANING[name]
        if not value or value in FINE.get(name, ()):
            continue
        if not goes_on:
            raise ArgumentError(f"{where}: {name} cannot be used: {reason}")
        logger.warning("%s: %s has no effect: %s", where, name, reason)
    quantised(kept, where)
    if kept.get("bf16") in ("auto", "full"):
        kept["bf16"] = True
    if kept.pop("lora_target_linear", None):
        kept["lora_target_modules"] = "all-linear"
    if kept.get("chat_template") == "tokenizer_default":
        kept["chat_template"] = None
    reporting(kept)
    return kept


def quantised(kept: dict[str, Any], where: str) -> None:
    """load_in_4bit and load_in_8bit as a format of experts."""
    for name, experts in (("load_in_4bit", "int4"), ("load_in_8bit", "int8")):
        asked = kept.pop(name, None)
        if not asked:
            continue
        if kept.get("experts") not in (None, experts):
            raise ArgumentError(f"{where}: {name} means experts: {experts}, found experts: {kept['experts']}")
        kept["experts"] = experts


def reporting(kept: dict[str, Any]) -> None:
    """report_to as a list; what names a place to report to also asks for it."""
    asked = kept.get("report_to")
    names = [asked] if isinstance(asked, str) else asked or []
    names = [name for name in names if name != "none"] if isinstance(names, list) else names
    for key, name in (("wandb_project", "wandb"), ("use_tensorboard", "tensorboard"), ("use_wandb", "wandb")):
        if kept.get(key) and isinstance(names, list) and name not in names:
            names = [*names, name]
    for key in ("use_tensorboard", "use_wandb"):
        kept.pop(key, None)
    if names or asked is not None:
        kept["report_to"] = names


# The same for one entry of `datasets`.
ENTRY_RENAMED = {"sharegpt": "chat_template", "chat_template.default": "chat_template"}
ENTRY_FINE: dict[str, tuple] = {
    "ds_type": ("json", "jsonl", "csv", "parquet", "text"),
    "roles_to_train": (["assistant"], ["gpt"], ["assistant", "gpt"]),
    "train_on_eos": ("turn",),
    "chat_template": ("tokenizer_default",),
}
ENTRY_REFUSED = {
    "roles_to_train": "the assistant's turns are learnt, or all with train_on_inputs: true",
    "train_on_eos": "what ends the assistant's turn is learnt",
    "chat_template": "one chat_template for the whole file",
    "conversation": "the chat template says how chats are written",
    "ds_type": "what a file is, is told from its ending",
    "data_files": "give the file as path",
    "roles": "roles are system, user, assistant and tool; human, gpt and the like are understood",
    "shards": "all rows are used",
}


def translate_entry(values: dict[str, Any], where: str) -> dict[str, Any]:
    """The same for an entry of `datasets` or `test_datasets`."""
    kept = dict(values)
    for name, reason in ENTRY_REFUSED.items():
        value = kept.pop(name, None)
        if value and value not in ENTRY_FINE.get(name, ()):
            raise ArgumentError(f"{where}: {name} cannot be used: {reason}")
    mapping = kept.pop("message_property_mappings", None)
    if isinstance(mapping, dict):
        kept.setdefault("message_field_role", mapping.get("role"))
        kept.setdefault("message_field_content", mapping.get("content"))
    if isinstance(kept.get("type"), str):
        kept["type"] = ENTRY_RENAMED.get(kept["type"], kept["type"])
    return kept
