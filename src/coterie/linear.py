"""One linear layer with packed weights: y = x W^T + b, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _native, handles, memory
from .arithmetic import Arithmetic, check_activations
from .border import BYTES, COMPUTED, DTYPES, F32, FLOATS, address, check_device, runs_now
from .checkpoints.codes import Codes
from .checkpoints.packed_linears import LinearsFile
from .errors import ArgumentError
from .formats import PANEL_ROWS, Format, resolve, round_up
from .packing import pack_codes


class Weight(Arithmetic, _native.Linear):
    """A packed weight as the kernels see it: what the operators find by its handle; keeps alive what they read."""

    def __init__(self, spec: Format, packed: Tensor, out_features: int, in_features: int, bias: Tensor | None) -> None:
        number, layout = handles.new_number(), spec.layout(out_features, in_features)
        matrix = address("weight", packed, BYTES, (spec.matrix_nbytes(out_features, in_features),))
        padded = None
        if bias is not None:
            padded = torch.zeros(round_up(out_features, PANEL_ROWS), dtype=torch.float32, device="cpu")
            padded[:out_features] = bias.detach()
        at = 0 if padded is None else address("bias", padded, F32, padded.shape)
        super().__init__(number, layout, matrix, at, (packed, padded))
        self.spec, self.layout, self.out_features, self.in_features = spec, layout, out_features, in_features
        self.allows_int8 = spec.int8_activations
        self.packed, self.bias = packed, None if padded is None else padded[:out_features]
        handles.register(number, self)


class Linear:
    """A linear layer whose weight [out, in] is packed, and frozen."""

    def __init__(
        self, spec: Format, packed: Tensor, out_features: int, in_features: int, bias: Tensor | None = None
    ) -> None:
        """`packed`: uint8 [spec.matrix_nbytes(out, in)]; `bias`: float [out]."""
        self._weight = Weight(spec, packed, out_features, in_features, bias)
        self._handle = handles.new_handle(self._weight)
        self.out_features, self.in_features = out_features, in_features

    @classmethod
    def pack(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        format: str | Format = "int8",
        group_size: int | None = None,
        zero_point: bool = False,
        scale_search: bool = True,
    ) -> Linear:
        """Quantise a dense weight [out, in], float, on the CPU. For the options see `Experts.pack`.

        Raises ArgumentError for a wrong shape or dtype, a group size that does not divide the columns, or a NaN or Inf
        that the format cannot hold.
        """
        if weight.dim() != 2 or weight.dtype not in FLOATS:
            raise ArgumentError(f"weight: expected a float matrix [out, in], found {weight.dtype} {list(weight.shape)}")
        rows, cols = weight.shape
        linear = cls.empty(rows, cols, bias, format=format, group_size=group_size, zero_point=zero_point)
        linear.pack_weight(weight, scale_search=scale_search)
        return linear

    @classmethod
    def empty(
        cls,
        out_features: int,
        in_features: int,
        bias: Tensor | None = None,
        *,
        format: str | Format = "int8",
        group_size: int | None = None,
        zero_point: bool = False,
    ) -> Linear:
        """Zeroed memory for a weight [out, in], to be filled by `pack_weight`. Errors are those of `pack`."""
        spec = resolve(format, group_size, zero_point)
        spec.check_columns("weight", in_features)
        packed = memory.allocate(spec.matrix_nbytes(out_features, in_features), f"a linear layer in {spec.name}")
        return cls(spec, packed, out_features, in_features, bias)

    def pack_weight(self, weight: Tensor, *, scale_search: bool = True) -> float:
        """Quantise a weight [out, in], float, on the CPU.

        Returns the relative error of what was packed, ``||W - packed(W)|| / ||W||``. Raises ArgumentError for another
        shape or dtype, and for a NaN or Inf that the format cannot hold.
        """
        shape = self.out_features, self.in_features
        weight = weight.detach().contiguous()
        source = address("weight", weight, FLOATS, shape)
        error = _native.pack(
            self.spec.layout(*shape), source, DTYPES[weight.dtype], shape[1], scale_search, self.packed.data_ptr()
        )
        if error < 0:
            raise ArgumentError(f"weight: NaN or Inf cannot be held in {self.spec.name}")
        return float(error)

    def pack_codes(self, codes: Codes) -> float:
        """Pack a weight that is quantised in this very format already, as it is.

        Returns the relative error of what was packed: 0, or that of scales which the format rounds. Raises
        ArgumentError for codes of another format or shape, or that are NaN.
        """
        if codes.spec != self.spec or not codes.held:
            raise ArgumentError(f"codes: expected {self.spec.described}, found {codes.spec.described}")
        kept, shape = codes.fitted(), (self.out_features, self.in_features)
        pack_codes(
            "weight", self.spec, shape, self.packed.data_ptr(), kept.codes, kept.scale, kept.zero, kept.row_scale
        )
        return kept.loss

    @classmethod
    def from_packed(cls, file: LinearsFile, name: str, bias: Tensor | None = None, *, mmap: bool = False) -> Linear:
        """The packed weight `name` of a file: copied into huge pages, or, with `mmap`, used where it lies."""
        layout = file.layout
        rows, cols = layout.shapes[name]
        if mmap:
            packed = file.mapped(name)
        else:
            packed = memory.allocate(layout.nbytes(name), f"a linear layer in {layout.spec.name}")
            file.read_into(name, packed)
        return cls(layout.spec, packed[: layout.spec.matrix_nbytes(rows, cols)], rows, cols, bias)

    @property
    def packed(self) -> Tensor:
        """The packed weight: uint8 [nbytes], a view."""
        return self._weight.packed

    @property
    def weight(self) -> Weight:
        """What the engine computes with."""
        return self._weight

    def uses_int8(self) -> bool:
        """See `Arithmetic.uses_int8`."""
        return self._weight.uses_int8()

    @property
    def spec(self) -> Format:
        """The format of the weight."""
        return self._weight.spec

    @property
    def bias(self) -> Tensor | None:
        """Float32 [out], or None."""
        return self._weight.bias

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight."""
        return self._weight.packed.nbytes

    @property
    def activations(self) -> str:
        """What x is multiplied as: "bf16", "int8", or "auto": int8 where the format allows it, until the layer is
        trained through."""
        return self._weight.activations

    @activations.setter
    def activations(self, activations: str) -> None:
        check_activations(activations, self.spec)
        self._weight.activations = activations

    def adapt(self) -> None:
        """See `Arithmetic.adapt`."""
        self._weight.adapt()

    def dequantize(self) -> Tensor:
        """Float32 [out, in]: what the kernels compute with."""
        weight, shape = self._weight, (self.out_features, self.in_features)
        out = torch.empty(shape, dtype=torch.float32, device="cpu")
        _native.unpack(weight.layout, weight.packed.data_ptr(), address("weight", out, F32, shape))
        return out

    def __repr__(self) -> str:
        return f"Linear({self.in_features} -> {self.out_features}, {self.spec.name}, {self.nbytes / 1e6:.1f} MB)"

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., in] float -> [..., out] in x's dtype. Gradients go back to x; the weight has none.

        Raises ArgumentError for another shape, dtype or device.
        """
        if x.shape[-1:] != (self.in_features,):
            raise ArgumentError(f"x: expected shape [..., {self.in_features}], found {list(x.shape)}")
        rows = x.reshape(-1, self.in_features)
        trained = torch.is_grad_enabled() and x.requires_grad
        if not trained and runs_now() and not rows.is_neg():
            out = self._weight.compute(rows, self._weight.uses_int8())
            if out is not None:
                return out.view(*x.shape[:-1], self.out_features)
        if x.dtype not in DTYPES:
            raise ArgumentError(f"x: expected bfloat16, float16 or float32, found {x.dtype}")
        check_device("x", x)
        if trained:
            self.adapt()
        given = rows.float() if x.dtype == torch.float16 else rows
        out = linear_forward(given.contiguous(), self._handle, self.out_features)
        return out.to(x.dtype).view(*x.shape[:-1], self.out_features)


@torch.library.custom_op("coterie::linear", mutates_args=())
def linear_forward(x: Tensor, handle: Tensor, out_features: int) -> Tensor:
    """x [rows, in] -> [rows, out] in x's dtype, bf16 or float32."""
    weight: Weight = handles.find(handle)
    out = x.new_empty((x.shape[0], out_features))
    weight.forward(
        x.shape[0], address("x", x, COMPUTED, (x.shape[0], weight.in_features)), DTYPES[x.dtype], weight.in_features,
        address("out", out, COMPUTED, out.shape), DTYPES[out.dtype], weight.uses_int8(),
    )  # fmt: skip
    return out


@linear_forward.register_fake
def _(x, handle, out_features):  # type: ignore[no-untyped-def]
    return x.new_empty((x.shape[0], out_features))


@torch.library.custom_op("coterie::linear_backward", mutates_args=())
def linear_backward(grad_out: Tensor, handle: Tensor, in_features: int) -> Tensor:
    """The gradient of x [rows, in], from that of the output [rows, out], in its dtype."""
    weight: Weight = handles.find(handle)
    rows = grad_out.shape[0]
    grad_x = grad_out.new_empty((rows, in_features))
    weight.backward(
        rows, address("grad_out", grad_out, COMPUTED, (rows, weight.out_features)), DTYPES[grad_out.dtype],
        weight.out_features, address("grad_x", grad_x, COMPUTED, (rows, in_features)), DTYPES[grad_x.dtype],
    )  # fmt: skip
    return grad_x


@linear_backward.register_fake
def _(grad_out, handle, in_features):  # type: ignore[no-untyped-def]
    return grad_out.new_empty((grad_out.shape[0], in_features))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, handle, _ = inputs
    ctx.in_features = x.shape[1]
    ctx.save_for_backward(handle)


def _backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
    (handle,) = ctx.saved_tensors
    return linear_backward(grad_out.contiguous(), handle, ctx.in_features), None, None


linear_forward.register_autograd(_backward, setup_context=_setup_context)
