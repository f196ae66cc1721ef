"""Experts of one layer for training LoRA: forward and backward, at once or in the background."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from coterie.errors import ArgumentError, StateError
from coterie.kt import steps
from coterie.kt.background import begin
from coterie.kt.bound import NAMES, BoundLora, add_to_parameters, check_names, check_shapes, shapes
from coterie.kt.layer import LayerExperts
from coterie.kt.options import Options

Device = torch.device | str
Result = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A forward whose backward is to come.

    publishes: whether backward answers as in kt-kernel 0.7.2, handing gradients to the bound parameters.
    """

    step: steps.Step
    input_dtype: torch.dtype
    weights_dtype: torch.dtype
    publishes: bool


@dataclass(frozen=True, slots=True)
class Submitted:
    """A forward in the background: its output and, where it is kept, what backward needs."""

    work: Future[tuple[Tensor, Kept | None]]
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class SubmittedBackward:
    """A backward in the background, and what it goes back through."""

    work: Future[list[Tensor]]
    kept: Kept
    device: Device
    scale: float


class SftExperts(LayerExperts):
    """Made by `KTMoEWrapper(mode="sft")`: `y = W x + (lora_alpha / lora_rank) * B (A x)` on gate, up and down.

    Inputs may be on any device and of any float dtype; they are copied to the CPU, and results come back in the dtype
    of what they belong to. LoRA lies on the CPU and is read where it lies: what an optimizer changes in place is seen.

    Up to `max_cache_depth` forwards may be outstanding; backward goes back through the latest. Two generations of
    callers are served. After `forward_sft`, `backward` returns the gradients of LoRA. After `forward`, which is how
    kt-kernel 0.7.2 calls it, it hands them to what `init_lora_weights` bound. A call that fails leaves everything as it
    was before.
    """

    def __init__(self, options: Options):
        super().__init__(options)
        self.lora_rank, self.lora_alpha = options.lora_rank, options.lora_alpha
        self.lora_scaling = options.lora_alpha / options.lora_rank
        self.max_cache_depth, self.chunked_prefill_size = options.max_cache_depth, options.chunked_prefill_size
        self._bound: BoundLora | None = None
        self._kept: list[Kept] = []
        self._submitted: Submitted | None = None
        self._submitted_backward: SubmittedBackward | None = None

    # --- LoRA ---

    def init_lora_weights(
        self,
        gate_lora_a: Tensor,
        gate_lora_b: Tensor,
        up_lora_a: Tensor,
        up_lora_b: Tensor,
        down_lora_a: Tensor,
        down_lora_b: Tensor,
        grad_gate_lora_a: Tensor | None = None,
        grad_gate_lora_b: Tensor | None = None,
        grad_up_lora_a: Tensor | None = None,
        grad_up_lora_b: Tensor | None = None,
        grad_down_lora_a: Tensor | None = None,
        grad_down_lora_b: Tensor | None = None,
    ) -> None:
        """Binds the caller's LoRA: the tensors themselves, not copies.

        After `forward`, `backward` adds the gradient of a factor that requires grad to its `.grad`, and replaces with
        that of any other what is in the tensor for it, `grad_*`.

        Args:
            gate_lora_a, up_lora_a: [E,R,H]. gate_lora_b, up_lora_b: [E,I,R]. down_lora_a: [E,R,I]. down_lora_b:
                [E,H,R]. bf16, fp16 or float32, on the CPU.
            grad_gate_lora_a, ...: of the same shapes; None for none.

        Raises ArgumentError for a wrong shape, with the tensor's name, dtype or device.
        """
        factors = dict(
            zip(NAMES, (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b), strict=True)
        )
        grads = (
            grad_gate_lora_a, grad_gate_lora_b, grad_up_lora_a, grad_up_lora_b, grad_down_lora_a, grad_down_lora_b,
        )  # fmt: skip
        gradients = {name: grad for name, grad in zip(NAMES, grads, strict=True) if grad is not None}
        expected = shapes(self.num_experts, self.hidden_size, self.moe_intermediate_size, self.lora_rank)
        check_shapes(factors, expected)
        check_shapes(gradients, {name: expected[name] for name in gradients}, prefix="grad_")
        for name, factor in factors.items():
            if factor.dtype not in (torch.bfloat16, torch.float16, torch.float32) or factor.device.type != "cpu":
                raise ArgumentError(
                    f"{name}: expected bfloat16, float16 or float32 on the CPU, found {factor.dtype} on {factor.device}"
                )
        self._bound = BoundLora(factors, gradients, self.lora_scaling)

    def bind_lora_parameters(
        self,
        gate_lora_a: Tensor,
        gate_lora_b: Tensor,
        up_lora_a: Tensor,
        up_lora_b: Tensor,
        down_lora_a: Tensor,
        down_lora_b: Tensor,
    ) -> None:
        """`init_lora_weights` of parameters, whose `.grad` the gradients are added to."""
        self.init_lora_weights(gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)

    def update_lora_weights(self) -> None:
        """To be called after an optimizer's step; there is nothing to do, as LoRA is read where it lies.

        Raises StateError where there is no LoRA.
        """
        self._lora()

    # --- forward ---

    def forward_sft(
        self,
        hidden_states: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        save_for_backward: bool = True,
        output_device: Device | None = None,
    ) -> Tensor:
        """The output [T,H] in the dtype of `hidden_states`, on `output_device` or else where they are.

        Args:
            hidden_states: [T,H], float, T at most `chunked_prefill_size`. expert_ids: slots [T,K], -1 for none.
            weights: [T,K], float.
            save_for_backward: keep what backward needs.

        Raises:
            StateError: weights or LoRA are not set up, or `max_cache_depth` forwards are outstanding.
            ArgumentError: a shape, dtype or id that does not fit.
        """
        self.submit_forward_sft(hidden_states, expert_ids, weights, save_for_backward)
        return self.sync_forward_sft(output_device)

    def submit_forward_sft(
        self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save_for_backward: bool = True
    ) -> None:
        """Begins `forward_sft` and returns at once; a forward that was submitted and not waited for is replaced.

        LoRA must not change until `sync_forward_sft`.
        """
        self._submit(hidden_states, expert_ids, weights, save_for_backward, publishes=False)

    def sync_forward_sft(self, output_device: Device | None = None) -> Tensor:
        """The output of the submitted forward. Raises StateError where there is none; else what the forward raised."""
        submitted, self._submitted = self._submitted, None
        if submitted is None:
            raise StateError("no forward was submitted: call submit_forward_sft() or submit_forward() first")
        out, kept = submitted.work.result()
        if kept is not None:
            self._kept.append(kept)
        return out.to(output_device or submitted.device, submitted.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        expert_ids: Tensor,
        weights: Tensor,
        save_for_backward: bool = True,
        output_device: Device | None = None,
    ) -> Tensor:
        """`forward_sft` by its name in kt-kernel 0.7.2: its backward hands gradients to the bound parameters."""
        self.submit_forward(hidden_states, expert_ids, weights, save_for_backward)
        return self.sync_forward(output_device)

    def submit_forward(
        self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save_for_backward: bool = True
    ) -> None:
        """`submit_forward_sft` for callers of kt-kernel 0.7.2: see `forward`."""
        self._submit(hidden_states, expert_ids, weights, save_for_backward, publishes=True)

    def sync_forward(self, output_device: Device | None = None) -> Tensor:
        """`sync_forward_sft`."""
        return self.sync_forward_sft(output_device)

    def _submit(self, hidden: Tensor, ids: Tensor, weights: Tensor, keep: bool, publishes: bool) -> None:
        experts, lora = self._loaded(), self._lora().lora
        if keep and len(self._kept) >= self.max_cache_depth:
            raise StateError(
                f"{len(self._kept)} forwards are outstanding, max_cache_depth is {self.max_cache_depth}: call "
                "backward() first, or pass save_for_backward=False"
            )
        if hidden.dim() == 2 and hidden.shape[0] > self.chunked_prefill_size:
            raise ArgumentError(
                f"hidden: expected at most chunked_prefill_size={self.chunked_prefill_size} tokens, "
                f"{[self.chunked_prefill_size, self.hidden_size]}, found shape {list(hidden.shape)}"
            )
        batch = self._batch(hidden, ids, weights)
        dtypes = hidden.dtype, weights.dtype

        def run() -> tuple[Tensor, Kept | None]:
            if keep:
                out, step = steps.forward(experts, *batch, lora)
                return out, Kept(step, *dtypes, publishes)
            with torch.no_grad():
                return experts(*batch, lora), None

        self._submitted = Submitted(begin(run), hidden.device, hidden.dtype)

    # --- backward ---

    def backward(
        self,
        grad_output: Tensor,
        lora_params: Mapping[str, Tensor] | Device | None = None,
        output_device: Device | None = None,
        optimizer_grad_scale: float = 1.0,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor] | Result:
        """Gradients of the latest outstanding forward, on `output_device` or else where `grad_output` is.

        After `forward_sft`: (grad_input [T,H], {"grad_gate_lora_a": [E,R,H], ..., "grad_down_lora_b": [E,H,R]},
        grad_weights [T,K]). After `forward`: (grad_input, grad_weights), and LoRA's gradients go where
        `init_lora_weights` says. Methods that end in _SkipLoRA have no gradients of LoRA, and those of the input and of
        the weights go through the frozen weights alone.

        Args:
            grad_output: [T,H], float.
            lora_params: parameters by name ("gate_lora_a", ...), to whose `.grad` the gradients are added as well. A
                device in this place is `output_device`, which is where kt-kernel 0.7.2 has it.
            optimizer_grad_scale: factor of LoRA's gradients alone.

        Raises StateError where no forward is outstanding, ArgumentError for another shape than the forward's.
        """
        if isinstance(lora_params, (str, torch.device)):
            lora_params, output_device = None, lora_params
        if lora_params is not None:
            check_names(lora_params)
        self.submit_backward_async(grad_output, output_device, optimizer_grad_scale)
        if self._kept[-1].publishes:
            return self.sync_backward()
        grad_input, grad_weights, grads = self._finish_backward()
        named = {f"grad_{name}": grad for name, grad in zip(NAMES, grads, strict=False)}
        if lora_params is not None:
            add_to_parameters(lora_params, named)
        return grad_input, named, grad_weights

    def submit_backward_async(
        self, grad_output: Tensor, output_device: Device | None = None, optimizer_grad_scale: float = 1.0
    ) -> None:
        """Begins `backward` and returns at once. LoRA must not change until `sync_backward`.

        Raises as `backward`, and StateError where one was submitted already.
        """
        if self._submitted_backward is not None:
            raise StateError("a backward was submitted already: call sync_backward() first")
        if not self._kept:
            raise StateError("no forward is outstanding: call forward_sft() first, with save_for_backward=True")
        lora, kept = self._lora().lora, self._kept[-1]
        if grad_output.shape != kept.step.x.shape:
            raise ArgumentError(
                f"grad_output: expected the shape of the forward, {list(kept.step.x.shape)}, found "
                f"{list(grad_output.shape)}"
            )
        if not grad_output.is_floating_point():
            raise ArgumentError(f"grad_output: expected a float dtype, found {grad_output.dtype}")
        scale = float(optimizer_grad_scale)
        if not isfinite(scale) or scale <= 0:
            raise ArgumentError(f"optimizer_grad_scale: expected a positive number, found {optimizer_grad_scale}")
        grad, trains = grad_output.detach().to("cpu", copy=True), not self._options.method.skips_lora
        work = begin(lambda: steps.backward(kept.step, grad, lora, trains))
        self._submitted_backward = SubmittedBackward(work, kept, output_device or grad_output.device, scale)

    def sync_backward(self) -> Result:
        """(grad_input [T,H], grad_weights [T,K]) of the submitted backward; LoRA's gradients go to what is bound.

        Raises StateError where none was submitted; else what the backward raised.
        """
        grad_input, grad_weights, grads = self._finish_backward()
        if grads:
            self._lora().publish(grads)
        return grad_input, grad_weights

    def _finish_backward(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Gradients of the input, of the weights and of LoRA, and the forward is outstanding no longer."""
        submitted, self._submitted_backward = self._submitted_backward, None
        if submitted is None:
            raise StateError("no backward was submitted: call submit_backward_async() first")
        grad_input, grad_weights, *grads = submitted.work.result()
        self._kept.remove(submitted.kept)
        for grad in grads:
            grad.mul_(submitted.scale)
        kept, device = submitted.kept, submitted.device
        return grad_input.to(device, kept.input_dtype), grad_weights.to(device, kept.weights_dtype), grads

    def _lora(self) -> BoundLora:
        if self._bound is None:
            raise StateError("no LoRA is set up: call init_lora_weights() first")
        return self._bound
