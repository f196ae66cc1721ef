"""Linear attention with the norm before it, its projections, and what it is added to, as one call of the engine."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from coterie import _native
from coterie.hf.dense import PackedLinear
from coterie.hf.inference.delta import MASK, QuickDelta, alone, remembered
from coterie.hf.inference.growing import ARGUMENTS
from coterie.hf.inference.norms import QuickNorm


class DeltaMixer:
    """Linear attention by the gated delta rule, of a module that the engine has answered for before."""

    PLACE = "linear_attn"

    @staticmethod
    def fits(module: nn.Module | None) -> bool:
        """Whether a module may be such."""
        return isinstance(module, QuickDelta) and all(isinstance(p, PackedLinear) for p in module.projections())

    @staticmethod
    def projections(module: Any) -> list[Any]:
        """Those of such a module, the last behind what it attends to."""
        return module.projections()

    @staticmethod
    def memory(module: Any, cache: Any) -> Any:
        """A module's part of a cache, if that goes on from a token before and the engine computes it."""
        found = remembered(cache, module) if isinstance(module, QuickDelta) and module.is_proved() else None
        return found if found is not None and found.has_previous_state[0] else None

    @classmethod
    def found(cls, module: Any, norm: QuickNorm, random: Tensor, kwargs: dict[str, Any], memory: Any) -> DeltaMixer:
        """The one with the norm before it."""
        return cls(module, norm)

    def __init__(self, module: Any, norm: QuickNorm) -> None:
        self._norm, self._module = norm, module
        *self._projections, self._output = [p.packed.linear.weight for p in module.projections()]
        self.attending = 0.0  # seconds that the recurrence has taken in all calls

    def __call__(self, x: Tensor, kwargs: dict[str, Any], memory: Any) -> Tensor | None:
        """x [B, 1, H] -> what attention makes of it; the cache is what it is behind it then. None: nothing was done."""
        integer = {weight.uses_int8() for weight in self._projections}
        if len(integer) > 1 or kwargs.get(MASK) is not None:
            return None
        norm, own = self._norm, self._module.own_parts(memory)
        weight, output = norm._parameters["weight"], self._output
        found = _native.delta_step(
            x, weight, norm.quick, self._projections, output, own, integer.pop(), output.uses_int8()
        )
        if found is None:
            return None
        self.attending += found[1]
        return found[0]

    def tried(self, x: Tensor, kwargs: dict[str, Any], memory: Any) -> Tensor | None:
        """The same with a copy of the cache."""
        return self(x, kwargs, copy.deepcopy(memory))

    @staticmethod
    def on_trial(module: Any, kwargs: dict[str, Any], memory: Any) -> dict[str, Any]:
        """What a layer is called with, and a cache that stays as it is."""
        return {k: alone(v, module.layer_idx) if k in ARGUMENTS and v is not None else v for k, v in kwargs.items()}
