"""Whether packed experts compute the function that vLLM's model does."""

from __future__ import annotations

from dataclasses import replace

from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from coterie.activations import Activation
from coterie.errors import CheckpointError

# What vLLM's activations are here. Of the clamped ones gate and up stand in another order in vLLM's own weights.
SWIGLU_OAI = Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0)
KNOWN = {
    MoEActivation.SILU: Activation("silu"),
    MoEActivation.GELU: Activation("gelu"),
    MoEActivation.GELU_TANH: Activation("gelu_tanh"),
    MoEActivation.RELU2: Activation("relu2"),
    MoEActivation.SWIGLUOAI: SWIGLU_OAI,
    MoEActivation.SWIGLUOAI_UNINTERLEAVE: SWIGLU_OAI,
}


def check_activation(where: str, layer: RoutedExperts, packed: Activation, has_gate: bool) -> None:
    """Raises CheckpointError unless `packed` is what vLLM's layer would compute."""
    name = layer.activation
    known = {kind.without_mul(): act for kind, act in KNOWN.items()} | KNOWN
    expected = known.get(name)
    if expected is not None:
        given = {"alpha": layer.swiglu_alpha, "limit": layer.swiglu_limit, "up_offset": layer.swiglu_beta}
        expected = replace(expected, **{key: float(value) for key, value in given.items() if value is not None})
    if (expected, name.is_gated) != (packed, has_gate):
        raise CheckpointError(
            f"{where}: packed with {packed}, has_gate={has_gate}; vLLM's model computes {name.value}, which is "
            f"{expected}, has_gate={name.is_gated}"
        )
