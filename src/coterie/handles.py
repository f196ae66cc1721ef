"""How operators find packed weights: by a tensor that keeps them alive and holds their number."""

from __future__ import annotations

import secrets
import weakref
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError

_known: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def new_number() -> int:
    """A random number, so that a graph that was saved in one process finds no weights in another."""
    return secrets.randbits(63)


def register(number: int, owner: Any) -> None:
    """Has `find` answer with `owner` for handles of this number, for as long as it lives."""
    _known[number] = owner


def new_handle(owner: Any) -> Tensor:
    """A tensor by which the operators find packed weights, from the native object that they are.

    Operators take tensors and numbers only, and torch.compile specialises a graph on a number of a module: with a
    tensor, all layers of a model share one graph. The owner must not hold it: the two would never be freed.
    """
    with torch.inference_mode(False):  # autograd saves it
        return owner.handle()


def find(handle: Tensor) -> Any:
    """What a handle stands for. Raises ArgumentError where it is another process's, or gone."""
    owner = _known.get(int(handle))
    if owner is None:
        raise ArgumentError(
            "this graph computes packed weights that are not in this process: graphs refer to experts, they do not "
            "hold them; open the model here and compile or export it again"
        )
    return owner
