"""Gradient checkpointing that knows about experts: recompute everything but them."""

from __future__ import annotations

import functools
from typing import Any

from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from coterie.ops import EXPERTS_OP


def checkpointing(retain_experts: bool = True) -> dict[str, Any]:
    """Arguments for gradient checkpointing, wherever Transformers, TRL or `torch.utils.checkpoint` take them:

        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=coterie.checkpointing())
        SFTConfig(gradient_checkpointing=True, gradient_checkpointing_kwargs=coterie.checkpointing(), ...)

    retain_experts: keep what the experts computed (T*K*2I values a layer) and recompute only the rest in the backward
        pass, so each layer's experts run forward once, but for those that are on a GPU; False: recompute everything,
        and keep only the layers' inputs.
    """
    if not retain_experts:
        return {"use_reentrant": False}
    return {
        "use_reentrant": False,
        "context_fn": functools.partial(create_selective_checkpoint_contexts, keep_experts),
    }


def keep_experts(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """The policy: experts' results are saved, everything else is recomputed."""
    return CheckpointPolicy.MUST_SAVE if operator == EXPERTS_OP else CheckpointPolicy.PREFER_RECOMPUTE
