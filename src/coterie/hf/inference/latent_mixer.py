"""Attention to latents with the norm before it, its projections and the cache, as one call of the engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from coterie import _native
from coterie.hf.dense import PackedLinear
from coterie.hf.inference.attention_mixer import AttentionMixer
from coterie.hf.inference.latent import EXPANSION, LANES, QuickLatent, rounds
from coterie.hf.inference.norms import QuickNorm

QUERIES, QUERY_LATENTS = ("q_proj",), ("q_a_proj", "q_b_proj")  # made of the input, or of latents of their own
QUERY_NORM = "q_a_layernorm"
LATENTS, LATENT_NORM, OUTPUT = "kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj"


class LatentMixer(AttentionMixer):
    """Attention to latents, which queries reach as `halves` says: one half of what is turned behind the other, column
    by column, or column by column and so they stay."""

    WAYS = (0, 1, 2)

    @staticmethod
    def fits(module: nn.Module | None) -> bool:
        """Whether a module may be such."""
        if not isinstance(module, QuickLatent):
            return False
        parts = dict(module.named_children())
        ways = [{*QUERIES}, {*QUERY_LATENTS, QUERY_NORM}]
        built = parts.keys() in [way | {LATENTS, LATENT_NORM, EXPANSION, OUTPUT} for way in ways]
        return (
            built
            and all(isinstance(p, PackedLinear) for p in LatentMixer.projections(module))
            and all(isinstance(parts[name], QuickNorm) for name in (QUERY_NORM, LATENT_NORM) if name in parts)
            and not module._parameters
            and all(hasattr(module, name) for name in ("scaling", "layer_idx", "config"))
            and module.qk_rope_head_dim % LANES == 0
        )

    @staticmethod
    def projections(module: nn.Module) -> list[Any]:
        """Those of such a module, the last behind what it attends to."""
        names = (*QUERY_LATENTS, *QUERIES, LATENTS, OUTPUT)
        return [module._modules[name] for name in names if module._modules.get(name) is not None]

    def __init__(self, module: Any, norm: QuickNorm | None, halves: int) -> None:
        self._module = module
        self._norms = norm, *(module._modules.get(name) for name in (QUERY_NORM, LATENT_NORM))
        *query_latents, queries, latents, output = [p.packed.linear.weight for p in self.projections(module)]
        self._first = query_latents[0] if query_latents else queries
        self._queries, self._latents, self._output, self._scaling = queries, latents, output, module.scaling
        norms = [None if n is None else n.quick for n in self._norms]
        sizes = module.qk_nope_head_dim, module.v_head_dim, module.qk_rope_head_dim
        weights = query_latents[0] if query_latents else None, queries, latents, output
        self._engine = _native.LatentAttentionStep(*weights, *norms, *sizes, module.scaling, halves)

    def _attend(self, x: Tensor, angles: Any, keys: Tensor, values: Tensor, used: int, mask: Any) -> Tensor | None:
        """Keys, which are latents, and values, what is beside them, [B, 1, room, D], get position `used`."""
        integer, output = self._first.uses_int8(), self._output.uses_int8()
        if integer != self._latents.uses_int8() or self._module.scaling != self._scaling:
            return None
        matrix = self._module.expansion_of(x.dtype)
        if type(angles) is Tensor and angles.is_complex():
            angles = angles.real.to(x.dtype).contiguous(), angles.imag.to(x.dtype).contiguous()
        if matrix is None or type(angles) is not tuple:
            return None
        norms = [None if n is None else n._parameters["weight"] for n in self._norms]
        flags = integer, self._queries.uses_int8(), rounds(matrix), output
        return self._engine(x, *norms, matrix, *angles, keys, values, used, mask, *flags)
