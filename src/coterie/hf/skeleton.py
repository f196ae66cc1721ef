"""Models without weights, run for what a run would take.

Nothing here knows a kind of attention or of cache: what counts is what the model's own code makes.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from coterie.errors import CheckpointError, UnsupportedModelError
from coterie.hf.empty import make_model
from coterie.hf.layout import Layout

TRACE = "coterie_trace"
TRACED_CONTEXT = 8192  # a longer cache is extrapolated from its growth here
OF_WEIGHTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution)
CACHES = ("cache", "past_key_values")  # what an output calls its cache, since Transformers 5.24 and before


def make_config(values: dict, where: str) -> Any:
    """The Transformers config of what a config.json holds, without what it says of quantisation.

    Raises UnsupportedModelError for a model that this Transformers does not know, CheckpointError for wrong values.
    """
    values = {key: value for key, value in values.items() if key != "quantization_config"}
    if isinstance(values.get("text_config"), dict):
        values["text_config"] = {k: v for k, v in values["text_config"].items() if k != "quantization_config"}
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        own_code = "; its own code (auto_map) is not run here" if "auto_map" in values else ""
        raise UnsupportedModelError(
            f"{where}: model_type is {model_type!r}, which this Transformers ({transformers.__version__}) does not "
            f"know{own_code}"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(_decoded(values))
    except Exception as error:  # Transformers' own checks of the values, which have no common type
        raise CheckpointError(f"{where} is no valid {model_type} config: {error}") from error


def _decoded(value: Any) -> Any:
    """With the numbers that JSON has no word for, which Transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        named = value.get("__float__") if len(value) == 1 else None
        return float(named) if named in ("Infinity", "-Infinity", "NaN") else {k: _decoded(v) for k, v in value.items()}
    return [_decoded(one) for one in value] if isinstance(value, list) else value


def trace(model: Any, context: int) -> tuple[int, dict[nn.Module, int]]:
    """(bytes of the cache after `context` tokens, {experts module: experts a token uses}), from a run or two.

    model: on the meta device, in eval mode.
    """
    cache, per_token = _traced(model, min(context, TRACED_CONTEXT))
    if context > TRACED_CONTEXT:
        step = TRACED_CONTEXT // 128
        growth = (cache - _traced(model, TRACED_CONTEXT - step)[0]) / step
        cache += int(growth * (context - TRACED_CONTEXT))
    return cache, per_token


def _traced(model: Any, context: int) -> tuple[int, dict[nn.Module, int]]:
    per_token: dict[nn.Module, int] = {}

    def record(module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        per_token[module] = ids.shape[-1]
        return torch.empty_like(hidden)

    ids = torch.zeros(1, context, dtype=torch.long, device="meta")
    with torch.no_grad():
        output = _run(model, record, input_ids=ids, use_cache=True)
    cache = next(value for name, value in output.items() if name in CACHES)
    return _tensor_nbytes(cache, set()), per_token


def attention_operations(model: Any, tokens: int) -> int:
    """Operations, two a multiply-add, of a prompt's tokens with each other: products in which no weight takes part.

    model: on the meta device, in eval mode.
    """

    def skip(module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return torch.empty_like(hidden)

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        _run(model, skip, input_ids=ids, use_cache=True)
    counts = counter.get_flop_counts()["Global"]
    return sum(count for operator, count in counts.items() if operator not in OF_WEIGHTS)


def saved_for_backward(config: Any, layouts: dict[str, Layout], batch: int, tokens: int) -> int:
    """Bytes of activations that a forward pass of [batch, tokens] keeps until the backward pass, every weight frozen.

    What the experts keep of themselves is included; what LoRA adds, and the head and the loss, are not.
    """
    saved: dict[int, Any] = {}
    with FakeTensorMode():  # as on the CPU, so that its kinds of attention are chosen, but without storage
        model = make_model(config, dtype=torch.bfloat16).requires_grad_(False).train()
        layout_of = {model.get_submodule(name): layout for name, layout in layouts.items()}
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

        def experts(module: nn.Module, hidden: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
            return _Experts.apply(hidden, ids, routing, layout_of[module])

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                saved[storage._cdata] = storage
            return tensor

        hidden = torch.empty(batch, tokens, model.get_input_embeddings().weight.shape[1], dtype=torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _run(model, experts, inputs_embeds=hidden.requires_grad_(), use_cache=False)
    return sum(storage.nbytes() for storage in saved.values())


class _Experts(torch.autograd.Function):
    """Keeps what the packed experts keep: their input, the routing, and the pre-activations of gate and up in bf16."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ids: Tensor, routing: Tensor, layout: Layout) -> Tensor:
        width = layout.intermediate_size * (2 if layout.has_gate else 1)
        ctx.save_for_backward(hidden, ids, routing, hidden.new_empty(ids.numel(), width))
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError


def _run(model: Any, experts: Any, **inputs: Any) -> Any:
    """The output of the language model in `model`, its experts modules computed by the function `experts`."""
    ALL_EXPERTS_FUNCTIONS.register(TRACE, experts)
    model.set_experts_implementation(TRACE)
    try:
        return model.get_decoder()(**inputs)
    except Exception as error:  # a model's own forward, run on a config that nothing has checked
        raise UnsupportedModelError(f"{model.config.model_type} with this config does not run: {error}") from error


def _tensor_nbytes(value: Any, visited: set[int]) -> int:
    """Bytes of every tensor that a cache holds, whatever its kind."""
    if id(value) in visited:
        return 0
    visited.add(id(value))
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_tensor_nbytes(v, visited) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_tensor_nbytes(v, visited) for v in value)
    return _tensor_nbytes(vars(value), visited) if hasattr(value, "__dict__") else 0
