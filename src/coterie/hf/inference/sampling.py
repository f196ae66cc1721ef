"""Drawing a token from a vocabulary of a hundred thousand and more: among the likeliest, where the settings leave no
others. Transformers sorts the whole vocabulary and draws a number for each of its tokens, which takes a model on a CPU
as long as several of its layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

KNOWN = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)  # in the order that they come
TIES = 32  # tokens as likely as the last of the top k, which are taken too
FIRST, FACTOR = 256, 16  # tokens that are looked at; times which, where they do not do
ALL = 1 << 40  # as a top k
NOTHING = "no token can be drawn: a score is NaN or infinite, or there is none"


def draw_instead(processors: LogitsProcessorList, settings: Any, ids: Tensor) -> tuple[LogitsProcessorList, Any] | None:
    """Logits processors and settings of `generate` with which greedy decoding takes what sampling draws, from the same
    distribution; None where they are to stay."""
    told = settings.return_dict_in_generate and settings.output_scores
    if not settings.do_sample or ids.device.type != "cpu" or told:
        return None
    first = len(processors)
    while first and type(processors[first - 1]) in KNOWN:
        first -= 1
    warpers = {type(warper): warper for warper in processors[first:]}
    odd = any(getattr(w, "min_tokens_to_keep", 1) != 1 or w.filter_value != -torch.inf for w in _filters(warpers))
    if odd or [kind for kind in KNOWN if kind in warpers] != [type(warper) for warper in processors[first:]]:
        return None
    greedy = copy.copy(settings)
    greedy.do_sample = False
    return LogitsProcessorList([*processors[:first], Drawn(warpers)]), greedy


def _filters(warpers: dict[type, Any]) -> list[Any]:
    return [warper for kind, warper in warpers.items() if kind is not TemperatureLogitsWarper]


class Drawn(LogitsProcessor):
    """Scores [B, V] -> the same shape, of which one token of each row is left, drawn from what `warpers` make of
    them."""

    def __init__(self, warpers: dict[type, Any]) -> None:
        def option(kind: type, name: str, otherwise: Any) -> Any:
            return getattr(warpers[kind], name) if kind in warpers else otherwise

        self.temperature = option(TemperatureLogitsWarper, "temperature", 1.0)
        self.top_k = option(TopKLogitsWarper, "top_k", ALL)
        self.top_p = option(TopPLogitsWarper, "top_p", 1.0)
        self.min_p = option(MinPLogitsWarper, "min_p", 0.0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        rows = len(scores)
        options = (torch.full((rows,), value) for value in (self.top_k, self.top_p, self.min_p))
        return alone(scores, draw(scores / self.temperature, *options))


def alone(scores: Tensor, tokens: Tensor) -> Tensor:
    """Scores [B, V] of which one token of each row, [B, 1], is left."""
    return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)


def draw(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """A token [B, 1] of each row of scores [B, V] float32, divided by their temperatures. top_k [B] int64, the largest
    for 1; of ALL and 1.0 and 0.0 each leaves out nothing.

    Raises RuntimeError for rows with NaN, infinity, or nothing but minus infinity.
    """
    drawn = torch.empty(len(scores), 1, dtype=torch.int64)
    largest = top_k == 1
    free = ~largest & (top_k >= scores.shape[-1]) & (top_p >= 1) & (min_p <= 0)
    among = ~largest & ~free
    if largest.any():
        rows = _rows(scores, largest)
        if not rows.amax(-1).isfinite().all():
            raise RuntimeError(NOTHING)
        drawn[largest] = rows.argmax(-1, keepdim=True)
    if free.any():
        drawn[free] = _draw_from_all(_rows(scores, free))
    if among.any():
        probabilities, tokens = candidates(_rows(scores, among), top_k[among], top_p[among], min_p[among])
        drawn[among] = tokens.gather(1, torch.multinomial(probabilities, 1))
    return drawn


def candidates(scores: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> tuple[Tensor, Tensor]:
    """Of rows of scores [B, V] the tokens [B, N] that may be drawn, among others, and how likely each is, 0 for the
    others; not to the sum of 1. The options are as in `draw`."""
    size = scores.shape[-1]
    top_k, top_p, min_p = (option[:, None] for option in (top_k, top_p, min_p))
    limited = top_k < size
    total = torch.where(limited, 0, scores.logsumexp(-1, keepdim=True)) if not limited.all() else None
    count = min(size, max(FIRST if total is not None else 0, int(torch.where(limited, top_k, 0).max()) + TIES))
    while True:
        values, tokens = scores.topk(count)
        least = values.gather(1, (top_k - 1).clamp(max=count - 1))
        values = values.masked_fill(limited & (values < least), -torch.inf)
        own = values.logsumexp(-1, keepdim=True)
        found = (values - (own if total is None else torch.where(limited, own, total))).exp()
        left_out = (found.cumsum(-1) - found >= top_p) & (top_p < 1)
        left_out[:, 0] = False
        found = found.masked_fill(left_out, 0)
        found = found.masked_fill(found < min_p * found[:, :1], 0)
        if count == size or not (found[:, -1:] * ~limited).any():
            return found, tokens
        count = min(count * FACTOR, size)


def _rows(scores: Tensor, rows: Tensor) -> Tensor:
    return scores if rows.all() else scores[rows]


def _draw_from_all(scores: Tensor) -> Tensor:
    """By where a random number lies among sums of probabilities."""
    sums = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    if not total.isfinite().all():
        raise RuntimeError(NOTHING)
    return torch.searchsorted(sums, torch.rand_like(total) * total, right=True).clamp_(max=scores.shape[-1] - 1)
