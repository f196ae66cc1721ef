"""Going on from a packed checkpoint in Transformers' Trainer, which looks for weights under names of plain ones.

It concerns models that are trained without an adapter: adapters are saved and found under PEFT's own names.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from coterie.checkpoints.folder import PACKED_INDEX
from coterie.errors import CheckpointError
from coterie.hf.loading import from_pretrained
from coterie.hf.model import PackedModel
from coterie.hf.weight import PackedWeight

stock_load_from_checkpoint = Trainer._load_from_checkpoint
stock_load_best_model = Trainer._load_best_model


def load_rest(model: PreTrainedModel, folder: str | os.PathLike) -> None:
    """Puts all weights of a packed checkpoint but its experts, which stay as they are, into a model of the same shape.

    Raises CheckpointError when the checkpoint is broken or of another model.
    """
    stored = from_pretrained(folder, mmap=True, auto_class=type(model), dtype=torch.float32).state_dict()
    state = model.state_dict()
    shapes = ({name: tuple(tensor.shape) for name, tensor in tensors.items()} for tensors in (state, stored))
    wanted, found = shapes
    different = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if different:
        name = different[0]
        raise CheckpointError(
            f"{folder} is of another model: {name}: expected shape {wanted.get(name)}, found {found.get(name)}"
        )
    for name, tensor in state.items():
        if not isinstance(tensor, PackedWeight):
            tensor.copy_(stored[name])


def is_packed(model: nn.Module, folder: str | os.PathLike | None) -> bool:
    return isinstance(model, PackedModel) and folder is not None and (Path(folder) / PACKED_INDEX).is_file()


@functools.wraps(stock_load_from_checkpoint)
def load_from_checkpoint(self: Trainer, resume_from_checkpoint: str, model: nn.Module | None = None) -> Any:
    target = self.model if model is None else model
    if is_packed(target, resume_from_checkpoint):
        return load_rest(target, resume_from_checkpoint)
    return stock_load_from_checkpoint(self, resume_from_checkpoint, model)


@functools.wraps(stock_load_best_model)
def load_best_model(self: Trainer) -> Any:
    best = self.state.best_model_checkpoint
    return load_rest(self.model, best) if is_packed(self.model, best) else stock_load_best_model(self)


Trainer._load_from_checkpoint = load_from_checkpoint
Trainer._load_best_model = load_best_model
