"""coterie: run and fine-tune Mixture-of-Experts models larger than your GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import coterie_hook

from . import cpu
from .activations import Activation
from .experts import Experts
from .linear import Linear
from .lora import ExpertLora
from .recompute import checkpointing
from .tickets import Ticket

if TYPE_CHECKING:
    from .hf import CoterieConfig, from_pretrained

cpu.read_environment()
coterie_hook.install()

__version__ = "0.1.0"
__all__ = [
    "Activation",
    "CoterieConfig",
    "ExpertLora",
    "Experts",
    "Linear",
    "Ticket",
    "checkpointing",
    "cpu",
    "from_pretrained",
]


def __getattr__(name: str) -> Any:
    """What needs transformers is imported when it is asked for."""
    if name in ("CoterieConfig", "from_pretrained"):
        from . import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
