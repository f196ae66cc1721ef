"""The forward of a layer of experts as torch sees it: checks, and a custom operator for torch.compile and autograd."""

import itertools
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import ArgumentError
from .lora import ExpertLora

if TYPE_CHECKING:
    from .experts import Experts

DTYPES = {torch.bfloat16: 0, torch.float32: 1, torch.float16: 2}  # in the order of the native enum

_numbers = itertools.count()
_registered: weakref.WeakValueDictionary[int, 'Experts'] = weakref.WeakValueDictionary()


def register(experts: 'Experts') -> Tensor:
    """A handle by which the operators find the experts.

    Operators take tensors and numbers only, and torch.compile specialises a graph on a number of a module: with a
    tensor, all layers of a model share one graph.
    """
    number = next(_numbers)
    _registered[number] = experts
    with torch.inference_mode(False):  # autograd saves the handle
        return torch.tensor(number, device="cpu")


def _experts(handle: Tensor) -> 'Experts':
    return _registered[int(handle)]


def forward(experts: 'Experts', x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None = None) -> Tensor:
    """See Experts.__call__. Without gradients and LoRA the format's fast path, else bf16 activations."""
    check(experts, x, ids, weights)
    if lora is not None:
        lora.check(experts)
    if lora is None and not (torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)):
        if torch.compiler.is_compiling():
            return experts_forward(x, ids, weights, experts._handle)
        return _compute(experts, x, ids, weights)
    return _train(experts, x, ids, weights, lora or ExpertLora())


def _train(experts: 'Experts', x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora) -> Tensor:
    given = x.float() if x.dtype == torch.float16 else x
    flat = [_parameter(t) for pair in lora.pairs().values() for t in pair]
    shared = lora.gate_a is not None and lora.gate_a is lora.up_a
    if shared:
        flat[2] = None
    out, _, _ = experts_train(
        given.contiguous(), ids.to(torch.int64).contiguous(), weights.to(torch.float32).contiguous(), experts._handle,
        *flat, lora.scalings(), shared, experts.intermediate_size, experts.has_gate,
    )  # fmt: skip
    return out.to(x.dtype)


def _parameter(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    experts, rows, rank = tensor.shape
    tensor = tensor.float() if tensor.dtype == torch.float16 else tensor
    if tensor.stride() != (1, rank * experts, experts):
        return tensor.contiguous()
    # B as PEFT keeps it, an expert after the other in memory: torch swaps two axes faster than it turns three.
    return tensor.permute(1, 2, 0).view(rows * rank, experts).t().contiguous().view(experts, rows, rank)


def check(experts: 'Experts', x: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Raise ArgumentError for anything the engine cannot take."""
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
        if tensor.device.type != "cpu":
            raise ArgumentError(f"{name}: expected a CPU tensor, found {tensor.device}")


@torch.library.custom_op("coterie::experts_forward", mutates_args=())
def experts_forward(x: Tensor, ids: Tensor, weights: Tensor, handle: Tensor) -> Tensor:
    return _compute(_experts(handle), x, ids, weights)


@experts_forward.register_fake
def _(x: Tensor, ids: Tensor, weights: Tensor, handle: Tensor) -> Tensor:
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
    """The output [T,H] and the pre-activations of gate and up, bf16 [T*K,I] in the engine's order of slots."""
    out, gate, up = _training_outputs(x, ids, intermediate_size, has_gate)
    factors = _factors((gate_a, gate_b, up_a, up_b, down_a, down_b), scalings, shared_a)
    with _argument_errors():
        _experts(handle).native.forward_training(
            x.shape[0], ids.shape[1], x.data_ptr(), DTYPES[x.dtype], x.stride(0), ids.data_ptr(), weights.data_ptr(),
            out.data_ptr(), DTYPES[out.dtype], gate.data_ptr(), up.data_ptr(), factors,
        )  # fmt: skip
    return out, gate, up


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
    parameters = (gate_a, gate_b, up_a, up_b, down_a, down_b)
    grad_x, grad_weights, *grads = _gradients(x, weights, parameters, wanted)
    _experts(handle).native.backward(
        x.shape[0], ids.shape[1], x.data_ptr(), DTYPES[x.dtype], grad_out.data_ptr(), DTYPES[grad_out.dtype],
        ids.data_ptr(), weights.data_ptr(), gate.data_ptr(), up.data_ptr(),
        grad_x.data_ptr(), DTYPES[grad_x.dtype], grad_weights.data_ptr(),
        _factors(parameters, scalings, shared_a, grads),
    )  # fmt: skip
    return grad_x, grad_weights, *grads  # type: ignore[return-value]


@experts_backward.register_fake
def _(grad_out, x, ids, weights, gate, up, handle, *rest):  # type: ignore[no-untyped-def]
    return _gradients(x, weights, rest[:6], rest[8])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, ids, weights, handle, *parameters, ctx.scalings, ctx.shared_a, _, _ = inputs
    ctx.given = [p is not None for p in parameters]
    ctx.save_for_backward(x, ids, weights, output[1], output[2], handle, *(p for p in parameters if p is not None))
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
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


experts_train.register_autograd(_backward, setup_context=_setup_context)


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


def _factors(
    parameters: Sequence[Tensor | None],
    scalings: Sequence[float],
    shared_a: bool,
    grads: Sequence[Tensor] | None = None,
) -> tuple[Any, ...]:
    """Addresses of LoRA and of its gradients, as the engine takes them."""
    factors = []
    for i in range(3):
        a, b = parameters[2 * i], parameters[2 * i + 1]
        if i == 1 and shared_a:
            a = parameters[0]
        if a is None or b is None:
            factors.append((0, 0, 0, 0, 0, 0.0, 0, 0))
            continue
        to = [grads[2 * i + j].data_ptr() if grads is not None and grads[2 * i + j].numel() else 0 for j in range(2)]
        factors.append((a.data_ptr(), b.data_ptr(), DTYPES[a.dtype], DTYPES[b.dtype], a.shape[1], scalings[i], *to))
    return (*factors, shared_a)


@contextmanager
def _argument_errors() -> Iterator[None]:
    """The engine's ValueError as ours."""
    try:
        yield
    except ValueError as error:
        raise ArgumentError(str(error)) from None


def _compute(experts: 'Experts', x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    if x.stride(1) != 1:
        x = x.contiguous()
    ids = ids.to(torch.int64).contiguous()
    weights = weights.to(torch.float32).contiguous()
    out = torch.empty(x.shape, dtype=torch.float32 if x.dtype == torch.float16 else x.dtype)
    with _argument_errors():
        experts.native.forward(
            x.shape[0], ids.shape[1], x.data_ptr(), DTYPES[x.dtype], x.stride(0), ids.data_ptr(), weights.data_ptr(),
            out.data_ptr(), DTYPES[out.dtype],
        )  # fmt: skip
    return out.to(x.dtype)
