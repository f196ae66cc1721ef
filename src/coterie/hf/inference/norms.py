"""RMSNorms of decoded tokens by one call each of the engine, or of a kernel on a GPU, found by trying them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from coterie import _native
from coterie.hf.inference.proving import ROWS, STEP, answer, decodes, difference, is_few, tried


def _normed(x: Tensor, weight: Tensor, options: tuple[float, bool, bool]) -> Tensor | None:
    if x.is_cpu:
        return _native.rms_norm(x, weight, *options)
    from coterie.gpu.kernels import token

    return token.rms_norm(x, weight, *options)


class QuickNorm(nn.Module):
    """Mixed into the class of an RMSNorm; `quick`: the arguments of `_native.rms_norm`."""

    quick: tuple[float, bool, bool]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [B, T, ..., H] -> its norm, in its dtype."""
        if decodes(self, x, args, kwargs) and x.dim() > 2 and x.shape[1] == 1 and is_few(x, len(x)):
            out = _normed(x, self.weight, self.quick)
            if out is not None:
                return out
        return super().forward(x, *args, **kwargs)


def norm_options(module: nn.Module) -> tuple[float, bool, bool] | None:
    """`QuickNorm.quick` of a module that is an RMSNorm; None for any other."""
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if module.weight.dim() != 1 or not isinstance(epsilon, float) or getattr(module, "bias", None) is not None:
        return None
    weight, x = tried(module)
    x *= torch.logspace(-4, 1, ROWS)[:, None].to(x.dtype)  # small ones show epsilon
    expected = answer(module, weight, x)
    if not isinstance(expected, Tensor) or expected.shape != x.shape or expected.dtype != x.dtype:
        return None
    best, least = None, STEP[x.dtype]
    for rounded, from_one in ((True, False), (False, False), (False, True)):
        found = _native.rms_norm(x, weight, epsilon, rounded, from_one)
        error = 1.0 if found is None else difference(found, expected)
        if error < least:
            best, least = (epsilon, rounded, from_one), error
    return best


