"""The forward of a layer of experts as torch sees it: checks, and a custom operator for torch.compile and autograd."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .border import BF16, COMPUTED, DTYPES, F32, FLOATS, I64, address, check_device, is_plain, runs_now
from .errors import ArgumentError
from .handles import find
from .layer import Layer
from .lora import ExpertLora

if TYPE_CHECKING:
    from .experts import Experts

Factors = Sequence[Tensor | None]  # A and B of gate, up and down
NO_LORA: tuple[Factors, list[float], bool] = ((None,) * 6, [1.0] * 3, False)


def forward(experts: 'Experts', x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None = None) -> Tensor:
    """See Experts.__call__. What needs no gradients keeps nothing, and is computed at once where nothing looks on."""
    if lora is None and not needs_gradients(x, weights) and runs_now():
        out = _as_they_are(experts._layer, x, ids, weights)
        if out is not None:
            return out
    given = checked(experts, x, ids, weights, lora)
    if needs_gradients(x, weights, *given):
        return _train(experts, x, ids, weights, lora)
    factors, scalings, shared = prepared(lora)
    if runs_now() and all(is_plain(t) for t in (x, ids, weights, *given)):
        return _compute(experts._layer, x, ids, weights, factors, scalings, shared)
    return experts_forward(x, ids, weights, experts._handle, *factors, scalings, shared)


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed from these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _as_they_are(layer: Layer, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor | None:
    """The output for tensors that need no conversion, checked and made by the engine; None for any other."""
    if x.is_neg() or weights.is_neg():
        return None
    try:
        return layer.compute(x, ids, weights, layer.uses_int8())
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def _train(experts: 'Experts', x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None) -> Tensor:
    out, _, _ = experts_train(*train_inputs(experts, x, ids, weights, lora))
    return out.to(x.dtype)


def train_inputs(
    experts: 'Experts', x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None
) -> tuple[Any, ...]:
    """What `experts_train` takes, in the engine's dtypes and strides."""
    given = x.float() if x.dtype == torch.float16 else x
    factors, scalings, shared = prepared(lora)
    return (
        given.contiguous(), ids.to(torch.int64).contiguous(), weights.to(torch.float32).contiguous(), experts._handle,
        *factors, scalings, shared, experts.intermediate_size, experts.has_gate,
    )  # fmt: skip


def prepared(lora: ExpertLora | None) -> tuple[Factors, list[float], bool]:
    """Factors and scalings as the engine takes them, and whether gate and up share one A, which is then the gate's."""
    if lora is None or all(factor is None for factor in lora.factors()):
        return NO_LORA
    shared = lora.gate_a is not None and lora.gate_a is lora.up_a
    factors = [engine_factor(factor) for factor in lora.factors()]
    if shared:
        factors[2] = None
    return factors, lora.scalings(), shared


def engine_factor(tensor: Tensor | None) -> Tensor | None:
    """A factor of LoRA as the engine takes it: itself wherever its dtype and strides allow."""
    if tensor is None:
        return None
    experts, rows, rank = tensor.shape
    tensor = tensor.float() if tensor.dtype == torch.float16 else tensor
    if tensor.stride() != (1, rank * experts, experts):
        return tensor.contiguous()
    # B as PEFT keeps it, an expert after the other in memory: torch swaps two axes faster than it turns three.
    return tensor.permute(1, 2, 0).view(rows * rank, experts).t().contiguous().view(experts, rows, rank)


def checked(experts: 'Experts', x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None) -> list[Tensor]:
    """The factors of LoRA that are given. Raises ArgumentError for anything the engine cannot take."""
    check_batch(experts, x, ids, weights)
    given = [factor for factor in (lora or ExpertLora()).factors() if factor is not None]
    if lora is not None and given:
        lora.check(experts)
        for name, pair in lora.pairs().items():
            for label, factor in zip("ab", pair, strict=True):
                if factor is not None:
                    check_device(f"{name}_{label}", factor)
    return given


def check_batch(
    experts: 'Experts',
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    device: torch.device | None = None,
) -> None:
    """Raises ArgumentError unless the tensors fit the experts and each other and are on `device`, None: the CPU."""
    if x.dim() != 2 or x.shape[1] != experts.hidden_size:
        raise ArgumentError(f"x: expected shape [tokens, {experts.hidden_size}], found {list(x.shape)}")
    if x.dtype not in DTYPES:
        raise ArgumentError(f"x: expected bfloat16, float16 or float32, found {x.dtype}")
    if ids.dim() != 2 or ids.shape[0] != x.shape[0]:
        raise ArgumentError(f"ids: expected shape [{x.shape[0]}, experts per token], found {list(ids.shape)}")
    if ids.dtype not in (torch.int64, torch.int32):
        raise ArgumentError(f"ids: expected int64 or int32, found {ids.dtype}")
    if ids.shape[1] > experts.num_experts:
        raise ArgumentError(f"ids: {ids.shape[1]} experts per token, but there are only {experts.num_experts}")
    if weights.shape != ids.shape:
        raise ArgumentError(f"weights: expected the shape of ids, {list(ids.shape)}, found {list(weights.shape)}")
    if not weights.is_floating_point():
        raise ArgumentError(f"weights: expected a float dtype, found {weights.dtype}")
    for name, tensor in (("x", x), ("ids", ids), ("weights", weights)):
        check_device(name, tensor, device)


@torch.library.custom_op("coterie::experts_forward", mutates_args=())
def experts_forward(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    handle: Tensor,
    gate_a: Tensor | None,
    gate_b: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    scalings: Sequence[float],
    shared_a: bool,
) -> Tensor:
    """The output [T,H], without what a backward pass would need."""
    return _compute(find(handle), x, ids, weights, (gate_a, gate_b, up_a, up_b, down_a, down_b), scalings, shared_a)


@experts_forward.register_fake
def _(x, ids, weights, handle, *rest):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("coterie::experts_train", mutates_args=())
def experts_train(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    handle: Tensor,
    gate_a: Tensor | None,
    gate_b: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    scalings: Sequence[float],
    shared_a: bool,
    intermediate_size: int,
    has_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [T,H] and the pre-activations of gate and up, bf16 [T*K,I]; a row of an id of -1 is left as it was."""
    layer = find(handle)
    layer.adapt()
    out, *kept = _training_outputs(x, ids, intermediate_size, has_gate)
    factors = _factors(layer, (gate_a, gate_b, up_a, up_b, down_a, down_b), scalings, shared_a)
    _run(layer, x, ids, weights, out, False, factors, *_kept(layer, ids, *kept))
    return out, *kept  # type: ignore[return-value]


EXPERTS_OP = torch.ops.coterie.experts_train.default


@experts_train.register_fake
def _(x, ids, weights, handle, *rest):  # type: ignore[no-untyped-def]
    return _training_outputs(x, ids, *rest[8:])


@torch.library.custom_op("coterie::experts_backward", mutates_args=())
def experts_backward(
    grad_out: Tensor,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate: Tensor,
    up: Tensor,
    handle: Tensor,
    gate_a: Tensor | None,
    gate_b: Tensor | None,
    up_a: Tensor | None,
    up_b: Tensor | None,
    down_a: Tensor | None,
    down_b: Tensor | None,
    scalings: Sequence[float],
    shared_a: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weights, and of A and B of gate, up, down; empty where there is none or none is wanted."""
    layer = find(handle)
    parameters = (gate_a, gate_b, up_a, up_b, down_a, down_b)
    grad_x, grad_weights, *grads = _gradients(x, weights, parameters, wanted)
    rows, slots = (x.shape[0], layer.hidden_size), tuple(ids.shape)
    try:
        layer.backward(
            *slots, address("x", x, COMPUTED, rows), DTYPES[x.dtype],
            address("grad_out", grad_out, COMPUTED, rows), DTYPES[grad_out.dtype],
            address("ids", ids, I64, slots), address("weights", weights, F32, slots), *_kept(layer, ids, gate, up),
            address("grad_x", grad_x, COMPUTED, rows), DTYPES[grad_x.dtype],
            address("grad_weights", grad_weights, F32, slots),
            _factors(layer, parameters, scalings, shared_a, grads),
        )  # fmt: skip
    except ValueError as error:
        raise ArgumentError(str(error)) from None
    return grad_x, grad_weights, *grads  # type: ignore[return-value]


@experts_backward.register_fake
def _(grad_out, x, ids, weights, gate, up, handle, *rest):  # type: ignore[no-untyped-def]
    return _gradients(x, weights, rest[:6], rest[8])


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ids, weights, handle, *parameters, ctx.scalings, ctx.shared_a, _, _ = inputs
    ctx.given = [p is not None for p in parameters]
    ctx.save_for_backward(x, ids, weights, output[1], output[2], handle, *(p for p in parameters if p is not None))
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs of `experts_train`, from a context that `setup_context` filled."""
    if grad_out is None:
        return (None,) * 14
    x, ids, weights, gate, up, handle, *saved = ctx.saved_tensors
    present = iter(saved)
    parameters = [next(present) if given else None for given in ctx.given]
    grad_x, grad_weights, *grads = experts_backward(
        grad_out.contiguous(), x, ids, weights, gate, up, handle, *parameters, ctx.scalings, ctx.shared_a,
        list(ctx.needs_input_grad[4:10]),
    )  # fmt: skip
    needed = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad[4:10], strict=True)]
    return grad_x, None, grad_weights, None, *needed, None, None, None, None


experts_train.register_autograd(backward, setup_context=setup_context)


def _training_outputs(x: Tensor, ids: Tensor, width: int, has_gate: bool) -> tuple[Tensor, Tensor, Tensor]:
    slots = ids.shape[0] * ids.shape[1]
    gate = x.new_empty((slots if has_gate else 0, width), dtype=torch.bfloat16)
    return torch.empty_like(x), gate, x.new_empty((slots, width), dtype=torch.bfloat16)


def _gradients(
    x: Tensor, weights: Tensor, parameters: Sequence[Tensor | None], wanted: Sequence[bool]
) -> tuple[Tensor, ...]:
    grads = (
        torch.empty_like(p) if p is not None and want else x.new_empty(0)
        for p, want in zip(parameters, wanted, strict=True)
    )
    return torch.empty_like(x), torch.empty_like(weights), *grads


def _kept(layer: Layer, ids: Tensor, gate: Tensor, up: Tensor) -> tuple[int, int]:
    """Addresses of the pre-activations of gate and up."""
    slots = ids.shape[0] * ids.shape[1]
    gate_slots = slots if layer.has_gate else 0
    return (
        address("pre-activations of gate", gate, BF16, (gate_slots, layer.intermediate_size)),
        address("pre-activations of up", up, BF16, (slots, layer.intermediate_size)),
    )


def _factors(
    layer: Layer,
    parameters: Factors,
    scalings: Sequence[float],
    shared_a: bool,
    grads: Sequence[Tensor] | None = None,
) -> tuple[Any, ...]:
    """Addresses of LoRA and of its gradients, as the engine takes them."""
    factors = []
    for i, name in enumerate(("gate", "up", "down")):
        a, b = parameters[2 * i], parameters[2 * i + 1]
        if i == 1 and shared_a:
            a = parameters[0]
        if a is None or b is None:
            factors.append((0, 0, 0, 0, 0, 0.0, 0, 0))
            continue
        rank, sizes = a.shape[1], (layer.intermediate_size, layer.hidden_size)
        rows, cols = sizes[::-1] if name == "down" else sizes
        shapes = ((layer.num_experts, rank, cols), (layer.num_experts, rows, rank))
        at = [address(f"{name} LoRA", t, COMPUTED, shape) for t, shape in zip((a, b), shapes, strict=True)]
        to = [0, 0]
        for j, factor in enumerate((a, b)):
            if grads is not None and grads[2 * i + j].numel():
                to[j] = address(f"gradient of {name} LoRA", grads[2 * i + j], (factor.dtype,), shapes[j])
        factors.append((*at, DTYPES[a.dtype], DTYPES[b.dtype], rank, scalings[i], *to))
    return (*factors, shared_a)


def _compute(
    layer: Layer,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    parameters: Factors,
    scalings: Sequence[float],
    shared_a: bool,
) -> Tensor:
    inputs = _inputs(layer, x, ids, weights, parameters, scalings, shared_a)
    _run(layer, *inputs)
    out = inputs[3]
    return out.half() if x.dtype == torch.float16 else out


def _inputs(
    layer: Layer,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    parameters: Factors,
    scalings: Sequence[float],
    shared_a: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, bool, tuple[Any, ...] | None]:
    """What `_run` takes where nothing is kept: x, ids and weights as they are or as the engine takes them, out, whether
    to compute with int8, and LoRA."""
    integer, factors = adaptation(layer, parameters, scalings, shared_a)
    if x.stride(1) != 1:
        x = x.contiguous()
    ids = ids.to(torch.int64).contiguous()
    weights = weights.to(torch.float32).contiguous()
    dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    out = torch.empty(x.shape, dtype=dtype, device="cpu")
    return x, ids, weights, out, integer, factors


def adaptation(
    layer: Layer, parameters: Factors, scalings: Sequence[float], shared_a: bool
) -> tuple[bool, tuple[Any, ...] | None]:
    """Whether a layer computes with int8, which one that has had LoRA does not, and LoRA as the engine takes it."""
    if all(p is None for p in parameters):
        return layer.uses_int8(), None
    layer.adapt()
    return False, _factors(layer, parameters, scalings, shared_a)


def _run(
    layer: Layer,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    out: Tensor,
    integer: bool,
    factors: tuple[Any, ...] | None,
    gate: int = 0,
    up: int = 0,
    owners: tuple[Any, ...] | None = None,
) -> Any:
    """Compute `out`; with `owners` of all that is read and written, in the background, and return the native ticket."""
    rows, slots = (x.shape[0], layer.hidden_size), tuple(ids.shape)
    try:
        batch = (
            *slots, address("x", x, FLOATS, rows, rows_apart=True), DTYPES[x.dtype], x.stride(0),
            address("ids", ids, I64, slots), address("weights", weights, F32, slots),
            address("out", out, COMPUTED, rows), DTYPES[out.dtype], integer,
        )  # fmt: skip
        return layer.forward(batch, factors, gate, up, owners)
    except ValueError as error:
        raise ArgumentError(str(error)) from None
