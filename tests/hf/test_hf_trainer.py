"""Transformers' Trainer on a packed model without an adapter: it goes on from the packed checkpoints it wrote."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

import coterie
from coterie.errors import CheckpointError
from coterie.hf.trainer import load_rest
from coterie.hf.weight import PackedWeight


def trainer(folder, output, steps: int, **options) -> Trainer:
    """Trains the attention of a packed model."""
    model = coterie.from_pretrained(folder, experts="int8", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("self_attn" in name and not isinstance(parameter, PackedWeight))
    ids = tiny_models.prompt(8)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(output),
        max_steps=steps,
        save_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)


def rest(model) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items() if not isinstance(t, PackedWeight)}


def test_goes_on_from_a_packed_checkpoint(checkpoint, tmp_path):
    whole = trainer(checkpoint("mixtral"), tmp_path / "whole", 2)
    whole.train()
    again = trainer(checkpoint("mixtral"), tmp_path / "whole", 2)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    expected, found = rest(whole.model), rest(again.model)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


def test_loads_the_best_model_at_the_end(checkpoint, tmp_path):
    made = trainer(
        checkpoint("qwen3_moe"), tmp_path, 2, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True
    )
    made.train()
    best = coterie.from_pretrained(made.state.best_model_checkpoint, dtype=torch.float32)
    expected, found = rest(best), rest(made.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_checkpoint_of_another_model_is_refused(packed, checkpoint):
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match="is of another model"):
        load_rest(model, packed)


def test_values_of_a_checkpoint_are_put_in(packed):
    model = coterie.from_pretrained(packed)
    file = packed / "model-00001-of-00001.safetensors"
    save_file({name: t + 1 for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    before = rest(model)
    load_rest(model, packed)
    assert all(torch.equal(t, before[name] + 1) for name, t in rest(model).items())
