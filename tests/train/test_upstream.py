"""What evaluation and logs rely on in TRL. A test that fails here says that upstream has moved, and where."""

from __future__ import annotations

import inspect

import pytest
from trl import DPOTrainer, SFTTrainer


def test_the_fused_head():
    """The model that SFTTrainer makes returns, by token, what an evaluation adds up."""
    source = inspect.getsource(SFTTrainer)
    assert 'outputs=("log_probs", "entropy", "is_top1")' in source
    for used in ("fused_lm_head=True", "-outputs.log_probs", "outputs.is_top1.sum()", "outputs.label_mask.sum()"):
        assert used in source


@pytest.mark.parametrize("trainer", [SFTTrainer, DPOTrainer])
def test_the_routers_loss(trainer):
    """Whether it is a part of the loss is looked up on each call; its coefficient and what a log calls it."""
    source = inspect.getsource(trainer)
    assert "if self.aux_loss_enabled:" in source and "self.router_aux_loss_coef * " in source
    assert '["aux_loss"]' in source
