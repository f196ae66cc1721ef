"""What training must answer, to a tight tolerance: the engine's own steps in plain torch, rounded where it rounds."""

from __future__ import annotations

import torch
from engine_cases import BF16_ACTIVATIONS, dense_of, rounds_weights
from gradient_cases import ROUNDED_TOLERANCE, TOLERANCE, gradients, relative
from torch import Tensor

from coterie import ExpertLora, Experts, cpu, reference


def bf16(v: Tensor) -> Tensor:
    return v.bfloat16().float()


@torch.no_grad()
def engine_gradients(
    experts: Experts, isa: str, x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora, grad: Tensor
) -> dict[str, Tensor]:
    """The output y and the gradients of x, routing weights and LoRA's factors, float32; a shared A's is the gate's.

    Weights (but for those that forward does not round), factors and the pre-activations that backward starts
    from are bf16 everywhere, what is multiplied with them on some instruction sets only.
    """

    def staged(v: Tensor) -> Tensor:
        return bf16(v) if isa in BF16_ACTIVATIONS else v

    dense = dense_of(experts)
    biases, factors = experts.biases(), dict(zip(lora.pairs(), lora.scalings(), strict=True))
    shared = lora.gate_a is lora.up_a
    x, grad = staged(x.float()), staged(grad.float())
    found = {"y": torch.zeros(x.shape), "x": torch.zeros(x.shape), "weights": torch.zeros(weights.shape)}
    for name, (a, b) in lora.pairs().items():
        if a is not None and not (shared and name == "up"):
            found[f"{name}_a"] = torch.zeros(a.shape)
        if b is not None:
            found[f"{name}_b"] = torch.zeros(b.shape)
    for e in ids.unique().tolist():
        if e < 0:
            continue
        t, k = (ids == e).nonzero(as_tuple=True)
        weight = weights[t, k, None].float()

        def pair(name: str, e: int = e) -> tuple[Tensor, Tensor, float] | None:
            a, b = lora.pairs()[name]
            return None if a is None else (bf16(a[e].float()), bf16(b[e].float()), factors[name])

        def forward(name: str, v: Tensor, e: int = e, pair=pair) -> Tensor:
            y = v @ (bf16(dense[name][e]) if rounds_weights(experts.formats[name], isa, len(v)) else dense[name][e]).T
            if pair(name):
                a, b, scaling = pair(name)
                y = y + staged(scaling * (v @ a.T)) @ b.T
            return y + biases[name][e] if name in biases else y

        def backward(name: str, v: Tensor, d: Tensor, times: Tensor, e: int = e, pair=pair) -> Tensor:
            """The gradient of the input `v`, from `d`, that of the output; `times` counts for LoRA's factors only."""
            back = d @ bf16(dense[name][e])
            if pair(name):
                a, b, scaling = pair(name)
                low = staged(scaling * (d @ b))
                found["gate_a" if shared and name == "up" else f"{name}_a"][e] += (times * low).T @ v
                found[f"{name}_b"][e] += d.T @ (times * staged(scaling * (v @ a.T)))
                back = back + low @ a
            return back

        ones = torch.ones_like(weight)
        gate, up = forward("gate", x[t]) if experts.has_gate else None, forward("up", x[t])
        hidden = staged(reference.act(experts.activation, gate, up))
        found["y"].index_add_(0, t, weight * forward("down", hidden))
        with torch.enable_grad():
            kept = [bf16(v).requires_grad_() for v in (gate, up) if v is not None]
            hidden = reference.act(experts.activation, kept[0] if experts.has_gate else None, kept[-1])
        d = backward("down", staged(hidden.detach()), grad[t], weight)
        found["weights"][t, k] = (d * hidden.detach()).sum(1)
        if "down" in biases:
            found["weights"][t, k] += grad[t] @ biases["down"][e]
        slopes = torch.autograd.grad(hidden, kept, d * weight)
        for name, slope in zip(experts.projections, slopes, strict=False):  # gate where there is one, and up
            found["x"].index_add_(0, t, backward(name, x[t], staged(slope), ones))
    return found


def compare(experts: Experts, batch, lora: dict[str, Tensor], scaling=2.0) -> dict[str, Tensor]:
    """All gradients, after comparing them with plain torch's, and with the engine's own roundings."""
    x, ids, weights, grad = batch
    found = gradients(lambda x, w, adapter: experts(x, ids, w, lora=adapter), x, weights, lora, grad, scaling=scaling)
    gate, up, down = experts.dequantize()
    biases = {f"{name}_bias": bias for name, bias in experts.biases().items()}

    def plain(x, w, adapter):
        return reference.forward(x, ids, w, gate, up, down, experts.activation, lora=adapter, **biases)

    wanted = gradients(plain, x, weights, lora, grad, torch.float32, scaling)
    adapter = ExpertLora(**lora, scaling=scaling)
    rounded = engine_gradients(experts, cpu.current_isa(), x, ids, weights, adapter, grad.to(x.dtype))
    for name in wanted:
        assert relative(found[name], wanted[name]) < TOLERANCE, name
        assert relative(found[name], rounded[name].to(found[name].dtype)) < ROUNDED_TOLERANCE, name
        assert name in ("y", "weights") or found[name].dtype == (x.dtype if name == "x" else lora[name].dtype)
    return found
