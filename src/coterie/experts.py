"""The packed weights of one layer of experts, and their forward."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import _native, handles, memory, ops, tickets
from .activations import Activation
from .arithmetic import check_activations
from .border import BYTES, DTYPES, F32, FLOATS, address, is_plain
from .checkpoints import Codes, LayerReader, PackedFile, open_layer, open_reader, packed, write_layer
from .cpu import current_isa
from .errors import ArgumentError
from .formats import PANEL_ROWS, Format, Formats, resolve, round_up
from .gpu import hybrid, offload, streaming
from .gpu.device import check_experts, usable
from .gpu.matrices import Matrices
from .gpu.rates import Rates
from .gpu.resident import Resident
from .gpu.stream import unpacked
from .layer import PROJECTIONS, Layer
from .lora import ExpertLora
from .packing import pack_codes

REPACKED = (
    "some experts have codes that no format holds ({odd}): they are dequantised and packed anew as {format}, with a "
    "relative error of {error:.1g}"
)


class Experts:
    """Experts of one layer, packed in CPU memory.

    ``out[t] = sum_k weights[t,k] * down_e(act(gate_e x[t], up_e x[t]))``, ``e = ids[t,k]``.

    Make one with :meth:`pack`, :meth:`open`, or :meth:`empty` and :meth:`pack_projection`.

    Attributes:
        num_experts, hidden_size, intermediate_size: E, H and I.
        formats: the weight formats; gate and up have one, down another or the same.
        activation: the function between the matrices.
        has_gate: False for a plain MLP, ``down(act(up x))``.
        activations: what experts of integer and 4-bit formats compute with. ``int8`` is fast, ``bf16`` exact; ``auto``
            is int8 until the experts are adapted or trained through, from then on bf16 with and without the adapter.
            May be set; setting ``auto`` starts anew. Other formats compute with bf16, and so do those beside them.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        formats: Format | Formats,
        activation: Activation = Activation(),  # noqa: B008
        has_gate: bool = True,
        activations: str = "auto",
    ) -> None:
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        for name, value in sizes.items():
            if value < 1:
                raise ArgumentError(f"{name}: expected at least 1, found {value}")
        current_isa()
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.formats, self.activation, self.has_gate = Formats.of(formats), activation, has_gate
        self.formats.check_columns(hidden_size, intermediate_size)
        self._weights: dict[int, Tensor] = {}
        self._biases: dict[str, Tensor] = {}
        self._mapped = False  # the weights are pages of a file
        self._placement: hybrid.Placement | None = None
        self._streaming: streaming.Streaming | None = None
        self._layer = Layer(self.formats, num_experts, hidden_size, intermediate_size, activation, has_gate)
        self._handle = handles.new_handle(self._layer)
        self.activations = activations

    # --- making ---

    @classmethod
    def pack(
        cls,
        gate: Tensor | None,
        up: Tensor,
        down: Tensor,
        *,
        format: str | Format | Formats = "int4",
        group_size: int | None = None,
        zero_point: bool = False,
        scale_search: bool = True,
        activation: Activation = Activation(),  # noqa: B008
        activations: str = "auto",
        gate_bias: Tensor | None = None,
        up_bias: Tensor | None = None,
        down_bias: Tensor | None = None,
    ) -> Experts:
        """Quantise dense weights: gate and up [E,I,H], down [E,H,I], any float dtype, on the CPU.

        ``gate`` None: an MLP without a gate.

        Args:
            format: ``bf16``, ``int8``, ``int4``, ``fp8_block``, ``fp8_channel``, ``mxfp4``, ``mxfp8``,
                ``nvfp4``, or GGUF's ``q4_0``, ``q4_1``, ``q5_0``, ``q5_1``, ``q8_0``, ``q2_k``,
                ``q3_k``, ``q4_k``, ``q5_k``, ``q6_k``, ``iq4_nl``, ``iq4_xs``; or, with one of its own for down,
                `coterie.formats.Formats`.
            group_size: columns that share a scale (int8, int4: 32, 64, 128; 0 = per row); None: the format's default,
                32 for int4, per row for int8.
            zero_point: int4 with a zero point per scale.
            scale_search: choose int4 scales for the least squared error rather than from the extreme value alone.
            activations: see the attribute.

        Raises:
            ArgumentError: a wrong shape, dtype or device, requires_grad, or a NaN or Inf that the format cannot hold.
        """
        if up.dim() != 3:
            raise ArgumentError(f"up: expected [experts, intermediate, hidden], found shape {list(up.shape)}")
        count, intermediate, hidden = up.shape
        experts = cls.empty(
            count, hidden, intermediate, format=format, group_size=group_size, zero_point=zero_point,
            activation=activation, has_gate=gate is not None, activations=activations,
        )  # fmt: skip
        given = {name: dense for name, dense in (("gate", gate), ("up", up), ("down", down)) if dense is not None}
        for name, dense in given.items():
            _check_dense(name, dense, (count, *experts.shape(name)))
        experts.set_biases(gate_bias, up_bias, down_bias)
        for name, dense in given.items():
            for e in range(count):
                experts.pack_projection(name, e, dense[e], scale_search=scale_search)
        return experts

    @classmethod
    def empty(
        cls,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        format: str | Format | Formats = "int4",
        group_size: int | None = None,
        zero_point: bool = False,
        activation: Activation = Activation(),  # noqa: B008
        has_gate: bool = True,
        activations: str = "auto",
    ) -> Experts:
        """Zeroed memory for the weights, to be filled by :meth:`pack_projection`.

        ``format``: by name, with its options, or whole.
        Raises DeviceError, before anything is allocated, where there is not enough memory.
        """
        formats = format if isinstance(format, Formats) else resolve(format, group_size, zero_point)
        experts = cls(num_experts, hidden_size, intermediate_size, formats, activation, has_gate, activations)
        experts._allocate()
        return experts

    def pack_projection(self, name: str, expert: int, weight: Tensor, *, scale_search: bool = True) -> float:
        """Quantise one matrix: ``weight`` [I,H] (gate, up) or [H,I] (down), CPU, float, columns adjacent in memory.

        Returns the relative error of what was packed, ``||W - packed(W)|| / ||W||``.
        """
        label = self._label(name, expert)
        _check_dense(label, weight, self.shape(name))
        if weight.stride(1) != 1 and weight.shape[1] > 1:
            raise ArgumentError(
                f"{label}: expected columns adjacent in memory, found strides {weight.stride()}; call .contiguous()"
            )
        error = _native.pack(
            self.formats[name].layout(*self.shape(name)),
            address(label, weight, FLOATS, self.shape(name), rows_apart=True), DTYPES[weight.dtype], weight.stride(0),
            scale_search, self._address(name, expert),
        )  # fmt: skip
        if error < 0:
            raise ArgumentError(f"{label}: NaN or Inf in the weights cannot be held in {self.formats[name].name}")
        return float(error)

    def pack_codes(
        self,
        name: str,
        expert: int,
        codes: Tensor,
        scale: Tensor | None = None,
        zero: Tensor | None = None,
        row_scale: Tensor | float | None = None,
    ) -> None:
        """Pack one matrix that is quantised already, without loss.

        Args:
            codes: [rows, cols]; 4-bit ones one to a byte. int8: q + 128; fp8: float8_e4m3fn.
            scale: of groups [rows, groups], in the format's own dtype (e8m0 as uint8); fp8_block: float32
                [rows / 128, cols / 128], rounded up; of GGUF's formats with several scales or minima, records, uint8
                [rows, groups, bytes] (docs/format.md).
            zero: zero points, uint8 [rows, groups], or [rows] with one scale per row.
            row_scale: float32 [rows], or one number for the matrix, where the format has such.

        Raises ArgumentError for wrong shapes and dtypes, for a part that is missing or that the format does not have,
        and for codes and scales that are NaN; the packed matrix is of no use then.
        """
        label, shape = self._label(name, expert), self.shape(name)
        if isinstance(row_scale, (int, float)):
            row_scale = torch.full(shape[:1], row_scale, dtype=torch.float32, device="cpu")
        pack_codes(label, self.formats[name], shape, self._address(name, expert), codes, scale, zero, row_scale)

    def pack_stored(self, name: str, expert: int, weight: Tensor | Codes, scale_search: bool = True) -> float:
        """Pack one matrix as a checkpoint stores it: codes of this very format as they are, others dequantised first.

        Returns the relative error of what was packed.
        """
        if isinstance(weight, Codes):
            if weight.spec == self.formats[name] and weight.held:
                kept = weight.fitted()
                self.pack_codes(name, expert, kept.codes, kept.scale, kept.zero, kept.row_scale)
                return kept.loss
            weight = weight.dequantize()
        return self.pack_projection(name, expert, weight, scale_search=scale_search)

    def set_biases(self, gate: Tensor | None = None, up: Tensor | None = None, down: Tensor | None = None) -> None:
        """Biases of the projections: gate and up [E,I], down [E,H]; None for none."""
        if self._placement is not None:
            raise ArgumentError("set_biases: expected experts that are in RAM; set biases before move()")
        for name, bias in (("gate", gate), ("up", up), ("down", down)):
            if bias is None:
                self._biases.pop(name, None)
                self._layer.set_biases(name, None)
                continue
            if name not in self.projections:
                raise ArgumentError("gate_bias: these experts have no gate")
            rows = self.shape(name)[0]
            if tuple(bias.shape) != (self.num_experts, rows):
                raise ArgumentError(f"{name}_bias: expected shape {[self.num_experts, rows]}, found {list(bias.shape)}")
            if not bias.is_floating_point() or not is_plain(bias):
                raise ArgumentError(f"{name}_bias: expected a plain float tensor on the CPU, found {_kind(bias)}")
            padded = torch.zeros(self.num_experts, round_up(rows, PANEL_ROWS), dtype=torch.float32, device="cpu")
            padded[:, :rows] = bias.detach()
            self._biases[name] = padded
            self._layer.set_biases(name, padded)

    def select(self, slots: Sequence[int | None]) -> Experts:
        """Experts of which number p is expert ``slots[p]`` of these, in the same memory.

        None: an expert that is not here. Its weights are zero, and all such experts share the memory of one.

        Raises ArgumentError for a number that is none of these experts'.
        """
        chosen = Experts(
            len(slots), self.hidden_size, self.intermediate_size, self.formats, self.activation, self.has_gate,
            self.activations,
        )  # fmt: skip
        absent = memory.allocate(self.expert_nbytes, "the experts that are not here") if None in slots else None
        for slot, expert in enumerate(slots):
            if expert is not None and expert not in self._weights:
                raise ArgumentError(f"slot {slot}: expected an expert 0..{self.num_experts - 1}, found {expert}")
            chosen._set_weights(slot, absent if expert is None else self.packed(expert))  # type: ignore[arg-type]
        biases = {}
        for name, bias in self.biases().items():
            none = bias.new_zeros(bias.shape[1])
            biases[name] = torch.stack([none if expert is None else bias[expert] for expert in slots])
        chosen.set_biases(**biases)
        return chosen

    # --- what it is ---

    @property
    def format(self) -> str:
        """The name of the format, or those of gate and up, and of down: ``q4_k/q6_k``."""
        return self.formats.name

    @property
    def spec(self) -> Format | None:
        """The format of all matrices; None where down has one of its own."""
        return self.formats.spec

    @property
    def activations(self) -> str:
        return self._layer.activations

    @activations.setter
    def activations(self, value: str) -> None:
        check_activations(value, self.formats)
        self._layer.activations = value
        if value == "auto":
            self._layer.adapted = False

    def uses_int8(self) -> bool:
        """Whether a forward in RAM without adapter and gradients rounds activations to int8."""
        return self._layer.uses_int8()

    def adapt(self) -> None:
        """Say that the experts are part of a model that has an adapter or is being trained: see ``activations``.

        Raises ArgumentError where ``activations`` is ``int8``.
        """
        self._layer.adapt()

    @property
    def projections(self) -> tuple[str, ...]:
        return PROJECTIONS if self.has_gate else PROJECTIONS[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights with their scales and zero points."""
        return self.num_experts * self.expert_nbytes

    @property
    def expert_nbytes(self) -> int:
        """Bytes of one packed expert."""
        return self._layer.expert_nbytes

    @property
    def moved(self) -> tuple[int, ...]:
        """Numbers of the experts that are on a device; see :meth:`move`."""
        return () if self._placement is None else self._placement.experts

    def shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of one expert's matrix."""
        up = self.intermediate_size, self.hidden_size
        return up[::-1] if name == "down" else up

    def biases(self) -> dict[str, Tensor]:
        """Float32 biases by projection, [E, rows]; empty where there are none."""
        return {name: bias[:, : self.shape(name)[0]] for name, bias in self._biases.items()}

    def packed(self, expert: int) -> Tensor:
        """One expert's packed bytes, uint8 [expert_nbytes]: gate, up and down back to back.

        A view; for an expert on a device a copy, whose padding may differ from what was moved there.
        """
        if expert in self._weights or self._placement is None:
            return self._weights[expert]
        one = Experts.empty(
            1, self.hidden_size, self.intermediate_size, format=self.formats, has_gate=self.has_gate
        )
        for name, matrices in self._placement.resident.matrices.items():
            one.pack_codes(name, 0, *matrices.parts(self._placement.experts.index(expert)))
        return one.packed(0)

    def numa_bytes(self) -> dict[tuple[int, int | None], int]:
        """Bytes of the packed matrices by (NUMA node whose threads compute them first, node whose memory holds them).

        Nodes have the system's numbers. None: in no node's memory, because never written or read, or swapped out; or
        the system does not say, as some versions of Linux while they look whether to move a page.
        """
        found: Counter[tuple[int, int | None]] = Counter()
        for expert, data in self._weights.items():
            for computed_by, held_by, nbytes in self._layer.located(expert, data):
                found[computed_by, held_by if held_by >= 0 else None] += nbytes
        return dict(found)

    def dequantize_projection(self, name: str, expert: int) -> Tensor:
        """Float32 [rows, cols]: the values one packed matrix stands for."""
        rows, cols = self.shape(name)
        out = torch.empty(rows, cols, dtype=torch.float32, device="cpu")
        if self._placement is not None and expert in self._placement.experts:
            return self._placement.dequantize(name, expert)
        matrix = self._address(name, expert)
        _native.unpack(self.formats[name].layout(rows, cols), matrix, address(name, out, F32, (rows, cols)))
        return out

    def dequantize(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """(gate [E,I,H] or None, up [E,I,H], down [E,H,I]) that the kernels compute with, float32."""
        dense = {
            name: torch.stack([self.dequantize_projection(name, e) for e in range(self.num_experts)])
            for name in self.projections
        }
        return dense.get("gate"), dense["up"], dense["down"]

    def __repr__(self) -> str:
        sizes = f"{self.num_experts} x {self.hidden_size} x {self.intermediate_size}"
        place = self._placement
        moved = "" if place is None else f", {len(place.experts)} of them on {place.resident.device}"
        return f"Experts({sizes}, {self.formats.described}, {self.nbytes / 1e6:.1f} MB{moved})"

    # --- computing ---

    @property
    def as_trained(self) -> bool:
        """Whether they compute as in training: asked for bf16 activations, or adapted or trained through."""
        return self._layer.as_trained

    @property
    def in_ram(self) -> Layer | None:
        """The experts as the kernels see them; None where some are on a device."""
        return self._layer if self._placement is None else None

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None = None) -> Tensor:
        """x [T,H] float, ids [T,K] integer (-1: no expert), weights [T,K] float -> [T,H] in x's dtype.

        Duplicates of an expert in one token add up. Same bits whatever the number of threads.

        Tensors on a GPU are copied to RAM, computed there and the result copied back, gradients likewise; LoRA's
        factors may be on either side. It waits for the GPU's stream. Not with up to 64 tokens without gradients, and
        factors in RAM: then the stream calls the engine when it comes to it. Until then the adapter must not change,
        and what is wrong with the values, an id out of range, is raised by a later call; the output is NaN.

        Experts that are on a device (see :meth:`move`) compute there with bf16 activations, those in RAM meanwhile; x,
        ids and weights must be on that device. Where all are on it, nothing is copied, and an id out of range fails as
        torch's own indexing does there. Experts that are sent to the tokens' device (see :meth:`stream`) compute there
        with bf16 activations too.

        Raises:
            ArgumentError: a wrong shape, dtype or device, or an id out of range.
        """
        if self._placement is not None:
            return hybrid.forward(self, self._placement, x, ids, weights, lora)
        if not x.is_cpu and x.device.type not in ("cpu", "meta"):
            if self._streaming is not None:
                return streaming.forward(self, self._streaming, x, ids, weights, lora)
            return offload.forward(self, x, ids, weights, lora)
        return ops.forward(self, x, ids, weights, lora)

    def submit(self, x: Tensor, ids: Tensor, weights: Tensor, lora: ExpertLora | None = None) -> tickets.Ticket:
        """Begin the same call in the background, and return at once: ``submit(...).wait()`` has the same bits.

        Tickets are computed one after the other, in the order in which they were submitted. Until one is done, x, the
        adapter and the experts must not change; they stay in memory, also where nothing else holds them.

        Raises:
            ArgumentError: as in a call; tensors that require gradients, outside of torch.no_grad(); tensors that are
                not plain, or calls that torch traces, transforms or intercepts.
            TicketError: Python is ending.
        """
        if self._placement is not None:
            raise ArgumentError("submit: expected experts that are all in RAM; call those that are on a device")
        return tickets.submit(self, x, ids, weights, lora)

    # --- copies ---

    def __deepcopy__(self, memo: dict[int, Any]) -> Experts:
        """Copies of a model share its packed weights, which never change."""
        return self

    def __copy__(self) -> Experts:
        return self

    def __reduce__(self) -> NoReturn:
        raise ArgumentError("packed experts cannot be pickled; write them with save() and read them with open()")

    # --- files ---

    def save(self, path: str | Path, layer: int = 0) -> None:
        """Write these experts as layer ``layer`` of a packed checkpoint; see docs/format.md."""
        write_layer(path, layer, self)

    @classmethod
    def open(cls, path: str | Path, layer: int = 0, mmap: bool = False, activations: str = "auto") -> Experts:
        """Experts of one layer of a checkpoint in any format that can be read: a folder or a file.

        Packed experts are opened as they are, quantised ones in their own formats, one for gate and up and one for
        down. Plain ones are packed into bf16, and those that differ within one of these.

        Args:
            mmap: use the pages of the file itself, shared between processes and evicted under memory pressure; for
                packed checkpoints only. The bits are the same.
            activations: see the attribute.

        Raises CheckpointError (MissingTensorError, listing the names tried, where a tensor is missing) and
        ArgumentError.
        """
        if packed(path):
            experts = cls.from_packed(open_layer(path, layer), mmap)
        else:
            reader = open_reader(path).layer(layer)
            if mmap:
                raise ArgumentError(
                    f"{path} is not packed, so its experts cannot be mapped: convert it, or open it with mmap=False"
                )
            experts = cls.from_reader(reader, format=reader.formats or "bf16")
        experts.activations = activations
        return experts

    @classmethod
    def from_packed(cls, file: PackedFile, mmap: bool = False) -> Experts:
        """Experts of a packed layer's file, read into huge-page memory or, with ``mmap``, used where they lie."""
        layout = file.layout
        sizes = layout.num_experts, layout.hidden_size, layout.intermediate_size
        experts = cls(*sizes, layout.formats, layout.activation, layout.has_gate)
        experts._mapped = mmap
        if not mmap:
            experts._allocate()
        for e in range(layout.num_experts):
            if mmap:
                experts._set_weights(e, file.mapped(e))
            else:
                file.read_into(e, experts.packed(e))
        experts.set_biases(**file.biases())
        return experts

    @classmethod
    def from_reader(
        cls,
        layer: LayerReader,
        *,
        format: str | Format | Formats = "int4",
        group_size: int | None = None,
        zero_point: bool = False,
        scale_search: bool = True,
    ) -> Experts:
        """Experts of a layer of an unpacked checkpoint, packed: beyond what is kept, one is in memory at a time.

        Warns of codes that no format holds, which are packed anew.
        """
        experts = cls.empty(
            layer.num_experts, layer.hidden_size, layer.intermediate_size, format=format, group_size=group_size,
            zero_point=zero_point, activation=layer.activation, has_gate=layer.has_gate,
        )  # fmt: skip
        errors = []
        for e in range(layer.num_experts):
            for name, weight in layer.expert(e).items():
                error = experts.pack_stored(name, e, weight, scale_search)
                if not layer.held(name, weight):
                    errors.append(error)
            layer.release(e)
        if errors:  # Python shows the same words once
            error = sum(errors) / len(errors)
            warnings.warn(REPACKED.format(odd=layer.odd, format=experts.format, error=error), stacklevel=2)
        experts.set_biases(**layer.biases())
        return experts

    # --- memory ---

    def move(self, device: str | torch.device, experts: Sequence[int] | None = None) -> None:
        """Move some experts, or all, to the memory of a device, packed in the same codes: they leave RAM.

        Not while they compute; once for all, and nothing can be packed into them then. Tensors go to RAM only for the
        experts that stay there.

        Args:
            device: "cuda" for instance.
            experts: their numbers; None: all.

        Raises:
            ArgumentError: no such experts, or some were moved before.
            DeviceError: no such device, or it cannot compute experts.
        """
        moved = tuple(sorted(set(range(self.num_experts) if experts is None else experts)))
        if self._streaming is not None:
            raise ArgumentError("move: these experts are sent to the tokens' device: see stream()")
        if self._placement is not None:
            raise ArgumentError(f"move: {len(self._placement.experts)} of these experts were moved before")
        if not moved or not 0 <= moved[0] <= moved[-1] < self.num_experts:
            raise ArgumentError(f"move: expected numbers from 0 to {self.num_experts - 1}, found {list(moved)}")
        there = usable(device)
        check_experts(there)
        matrices = self.unpacked(lambda part: torch.stack([self._weights[e][part].to(there) for e in moved]))
        own = torch.tensor(moved)
        biases = {name: bias[own].to(there) for name, bias in self.biases().items()}
        resident = Resident(there, matrices, biases, self.activation)
        self._placement = hybrid.Placement.of(resident, moved, self.num_experts)
        self._release(moved)

    def stream(self, from_tokens: int | None = None, rates: Rates | None = None) -> None:
        """From now on, send these experts to the device of the tokens, packed, wherever that is the faster way: for
        calls of many tokens that are on one. They stay in RAM, where the other calls are computed.

        Not for experts that were moved.

        Args:
            from_tokens: send them for so many tokens or more.
            rates: say from how many, where `from_tokens` does not; None: measured, in the first call.

        Raises ArgumentError for experts that were moved and a negative number of tokens.
        """
        if self._placement is not None:
            raise ArgumentError(f"stream: {len(self._placement.experts)} of these experts were moved to a device")
        if from_tokens is not None and from_tokens < 0:
            raise ArgumentError(f"stream: expected from_tokens of at least 0, found {from_tokens}")
        self._streaming = streaming.Streaming(from_tokens, rates)

    def unpacked(self, part: Callable[[slice], Tensor]) -> dict[str, Matrices]:
        """The matrices of n experts by projection, on any device: `part` gives some of their packed bytes there, uint8
        [n, bytes]."""
        matrices, start = {}, 0
        for name in self.projections:
            end = start + self.formats[name].matrix_nbytes(*self.shape(name))
            matrices[name], start = unpacked(self.formats[name], *self.shape(name), part(slice(start, end))), end
        return matrices

    def _release(self, moved: Sequence[int]) -> None:
        """Gives back the memory of experts that are elsewhere; those that stay are copied into memory of their own."""
        size, stay = self.expert_nbytes, [e for e in range(self.num_experts) if e not in moved]
        nowhere = torch.empty(size, dtype=torch.uint8, device="cpu")  # never read, so no page of it is taken
        for e in moved:
            self._layer.set_weights(e, nowhere)
            del self._weights[e]
        if self._mapped or not stay:
            return
        pages = memory.allocate(len(stay) * size, f"packed {self.format} experts")
        self._layer.place(pages)
        for e, page in zip(stay, pages.split(size), strict=True):
            page.copy_(self._weights[e])
            self._set_weights(e, page)

    def _allocate(self) -> None:
        pages = memory.allocate(self.nbytes, f"packed {self.format} experts")
        self._layer.place(pages)
        for e, page in enumerate(pages.split(self.expert_nbytes)):
            self._set_weights(e, page)

    def _set_weights(self, expert: int, data: Tensor) -> None:
        self._layer.set_weights(expert, data)
        self._weights[expert] = data

    def _label(self, name: str, expert: int) -> str:
        if name not in self.projections or not 0 <= expert < self.num_experts:
            raise ArgumentError(
                f"no {name!r} of expert {expert}: expected {self.projections}, experts 0..{self.num_experts - 1}"
            )
        return f"{name} of expert {expert}"

    def _address(self, name: str, expert: int) -> int:
        """Where one packed matrix lies."""
        if expert not in self._weights:
            raise ArgumentError(f"{name} of expert {expert}: is on a device, where nothing can be packed")
        start = address(f"expert {expert}", self._weights[expert], BYTES, (self.expert_nbytes,))
        before = self.projections[: self.projections.index(name)]
        return start + sum(self.formats[other].matrix_nbytes(*self.shape(other)) for other in before)


def _check_dense(label: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(weight.shape) != tuple(shape):
        raise ArgumentError(f"{label}: expected shape {list(shape)}, found {list(weight.shape)}")
    if weight.dtype not in DTYPES:
        raise ArgumentError(f"{label}: expected bfloat16, float16 or float32, found {weight.dtype}")
    if not is_plain(weight):
        raise ArgumentError(f"{label}: expected a CPU tensor, found {_kind(weight)}")
    if weight.requires_grad:
        raise ArgumentError(f"{label}: packed weights are frozen, but this tensor requires grad; pass weight.detach()")


def _kind(tensor: Tensor) -> str:
    """What a tensor is that is not the plain one expected: its device, or else its class and dtype."""
    return str(tensor.device) if tensor.device.type != "cpu" else f"{type(tensor).__name__} of {tensor.dtype}"
