"""Keys of axolotl's files."""

from __future__ import annotations

import pytest

from coterie.errors import ArgumentError
from coterie.train.axolotl import WITHOUT_MEANING


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"load_in_4bit": True, "adapter": "qlora"}, {"experts": "int4"}),
        ({"load_in_8bit": True, "load_in_4bit": False}, {"experts": "int8"}),
        ({"bf16": "auto", "fp16": False, "tf32": False}, {"bf16": True}),
        ({"lora_target_linear": True}, {"lora_target_modules": "all-linear"}),
        ({"lora_target_modules": "all-linear"}, {"lora_target_modules": "all-linear"}),
        ({"wandb_project": "mine", "wandb_name": "first"}, {"report_to": ["wandb"], "wandb_project": "mine"}),
        ({"report_to": "none"}, {"report_to": []}),
        ({"report_to": "tensorboard"}, {"report_to": ["tensorboard"]}),
        ({"use_tensorboard": True}, {"report_to": ["tensorboard"]}),
        ({"chat_template": "tokenizer_default"}, {"chat_template": None}),
        ({"dpo_beta": 0.3}, {"rl_beta": 0.3}),
        ({"deepspeed": None, "fsdp": [], "evals_per_epoch": 1, "special_tokens": {}}, {}),
    ],
    ids=str,
)
def test_understood(keys, expected, configure):
    config = configure(**{"experts": None, **keys})
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"deepspeed": "zero3.json"}, "deepspeed cannot be used: models are sharded over GPUs by it"),
        ({"fsdp": ["full_shard"]}, "fsdp cannot be used"),
        ({"fp16": True}, "fp16 cannot be used: models compute in bf16"),
        ({"load_in_4bit": True, "experts": "int8"}, "load_in_4bit means experts: int4, found experts: int8"),
        ({"evals_per_epoch": 4}, "evals_per_epoch cannot be used: give eval_steps"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules: expected a list or all-linear"),
        ({"datasets": [{"path": "a", "train_on_eos": "none"}]}, "train_on_eos cannot be used"),
    ],
    ids=str,
)
def test_refused_with_the_reason(keys, message, configure):
    with pytest.raises(ArgumentError, match=message):
        configure(**keys)


def test_what_has_no_effect_is_said(configure, caplog):
    configure(flash_attention=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert [record.message.rpartition("yaml: ")[2] for record in caplog.records] == [
        "flash_attention has no effect: attention is PyTorch's own",
        "gradient_checkpointing_kwargs has no effect: gradient_checkpointing says all",
    ]


def test_keys_of_the_table_are_not_keys_of_ours(configure):
    assert not set(WITHOUT_MEANING) & set(configure().__dataclass_fields__)


def test_report_to_what_is_not_installed(configure, tmp_path):
    from coterie.train.checks import check_reporting

    with pytest.raises(ArgumentError, match=r"report_to: zebra is not installed"):
        check_reporting(configure(report_to=["zebra"]).report_to)
