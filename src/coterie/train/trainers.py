"""The trainers of TRL and Transformers with losses that can be compared.

The router's balancing loss is told apart, and an evaluation's losses are means over all of its tokens (pairs, steps),
however these fall into batches and processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer
from trl import DPOTrainer, RewardTrainer, SFTTrainer

Sums = tuple[None, Tensor, Tensor]


class Comparable(Trainer):
    """To be named behind a trainer of TRL among a class's bases, so that `log` sees what that trainer adds to a log.

    Evaluation: `prediction_step` gives, in the place of predictions, what each row adds to `terms` [B, terms], and in
    the place of labels the number of tokens (pairs, steps) that it is about [B]; Trainer gathers both from all
    processes, each row once.
    """

    objective = "loss"  # the loss without the router's, as logs call it
    terms: tuple[str, ...] = ("loss",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "compute_metrics": self.means})
        self.accelerator.device_placement = False  # the model stays where it is; Trainer itself moves batches

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Trainer's, for a model that is where it belongs: adapters of experts in RAM stay there."""

    def means(self, evaluated: EvalPrediction) -> dict[str, float]:
        sums = evaluated.predictions.sum(axis=0) / evaluated.label_ids.sum()
        return dict(zip(self.terms, sums.tolist(), strict=True))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the objective by itself where the router's loss is a part of `loss`."""
        if "loss" in logs and "aux_loss" in logs:
            logs[self.objective] = logs["loss"] - self.router_aux_loss_coef * logs["aux_loss"]
        super().log(logs, start_time)


class Supervised(SFTTrainer, Comparable):
    objective = "lm_loss"
    terms = ("loss", "mean_token_accuracy")

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Sums:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        found = torch.stack([-outputs.log_probs, outputs.is_top1.to(outputs.log_probs.dtype)], dim=-1).double()
        counted = outputs.label_mask
        if "attention_mask" in inputs:
            return None, found.sum(1), counted.sum(1)
        # The rows lie one after the other in one sequence: whose is each prediction?
        rows = (inputs["position_ids"][0] == 0).cumsum(0) - 1
        sums, counts = found.new_zeros(int(rows[-1]) + 1, len(self.terms)), counted.new_zeros(int(rows[-1]) + 1).long()
        return None, sums.index_add(0, rows[1:], found[0]), counts.index_add(0, rows[1:], counted[0].long())


class ByPairs:
    """Evaluation of pairs: each counts as the mean of its batch. To be named before the trainer."""

    def prediction_step(self: Any, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Sums:
        inputs = self._prepare_inputs(inputs)
        router, self.aux_loss_enabled = getattr(self, "aux_loss_enabled", False), False
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
        finally:
            self.aux_loss_enabled = router
        pairs = len(inputs["input_ids"]) // 2
        return None, loss.double().expand(pairs, 1), torch.ones(pairs, dtype=torch.long, device=loss.device)


class Preferences(ByPairs, DPOTrainer, Comparable):
    objective = "dpo_loss"


class Rewards(ByPairs, RewardTrainer, Comparable):
    pass


class Steps(Comparable):
    """Of a classifier of tokens: the loss of a labelled token is that of a step."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Sums:
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(**inputs, use_cache=False).logits
        losses = nn.functional.cross_entropy(logits.transpose(1, 2).double(), labels, reduction="none")
        return None, losses.sum(1, keepdim=True), (labels != -100).sum(1)
