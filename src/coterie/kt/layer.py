"""A layer of experts in its slots: loading, and which of them are computed here."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from coterie.errors import ArgumentError, StateError
from coterie.experts import Experts
from coterie.kt.buffers import Buffers
from coterie.kt.options import Options
from coterie.kt.sources import Dense, Source, open_source


class LayerExperts(Buffers):
    """What both modes share. E slots hold the model's experts in the order of a map; ids name slots.

    Attributes:
        layer_idx, num_experts, num_experts_per_tok, hidden_size, moe_intermediate_size: as given to the factory.
        method: the name of the method.
        gpu_experts_mask: bool [E], True where the expert of a slot is on the GPU and therefore not loaded here.
        experts: the packed experts, one a slot; None until they are loaded.
        gate_proj, up_proj, down_proj: dense weights that `load_weights` packs and lets go of, where they are set.
    """

    def __init__(self, options: Options):
        self._options = options
        self.layer_idx, self.method = options.layer_idx, options.method.name
        self.num_experts, self.num_experts_per_tok = options.num_experts, options.num_experts_per_tok
        self.hidden_size, self.moe_intermediate_size = options.hidden_size, options.moe_intermediate_size
        self.gpu_experts_mask = torch.tensor(options.on_gpu(), dtype=torch.bool, device="cpu")
        self.num_gpu_experts = int(self.gpu_experts_mask.sum())
        self.experts: Experts | None = None
        self.gate_proj: Tensor | None = None
        self.up_proj: Tensor | None = None
        self.down_proj: Tensor | None = None

    def load_weights(self, physical_to_logical_map_cpu: Tensor) -> None:
        """Loads this layer from `weight_path`, or from gate_proj, up_proj and down_proj where those are set.

        A packed checkpoint must be in the method's format; of any other, codes that are in it already are kept.
        LLAMAFILE keeps what it finds in a GGUF file, or packed, and packs what is plain as bf16.

        Args:
            physical_to_logical_map_cpu: integers [E]: slot p holds the model's expert `map[p]`.

        Raises:
            StateError: no `weight_path`, and no weights set.
            CheckpointError: the checkpoint cannot be read, lacks the layer, or is in another format.
            ArgumentError: a map, or sizes of experts, that do not fit.
        """
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        if gate is not None and up is not None and down is not None:
            self.load_weights_from_tensors(gate, up, down, physical_to_logical_map_cpu)
            return
        if not self._options.weight_path:
            raise StateError(
                "no weights to load: give weight_path to KTMoEWrapper, or call load_weights_from_tensors()"
            )
        source = open_source(self._options.weight_path, self.layer_idx, self._options.method)
        self.experts = self._load(source, physical_to_logical_map_cpu)

    def load_weights_from_tensors(
        self, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor, physical_to_logical_map_cpu: Tensor
    ) -> None:
        """Quantises dense weights; with `cpu_save` also writes them into the packed checkpoint `weight_path`.

        Args:
            gate_proj, up_proj: [experts of the model, I, H], bf16, fp16 or float32, on any device.
            down_proj: [experts of the model, H, I].
            physical_to_logical_map_cpu: integers [E]: slot p holds the model's expert `map[p]`.

        Raises ArgumentError for a shape, dtype, map, or value that does not fit; CheckpointError where the layer cannot
        be written.
        """
        source = Dense(gate_proj, up_proj, down_proj, self._options.method)
        self.experts = self._load(source, physical_to_logical_map_cpu)
        self.gate_proj = self.up_proj = self.down_proj = None

    def _load(self, source: Source, slots: Tensor) -> Experts:
        for field, found in (("hidden_size", source.hidden_size), ("moe_intermediate_size", source.intermediate_size)):
            if found != getattr(self, field):
                raise ArgumentError(f"{field}: expected {getattr(self, field)}, found weights of {found}")
        chosen = self._chosen(slots, source.num_experts)
        here = [None if on_gpu else e for e, on_gpu in zip(chosen, self.gpu_experts_mask.tolist(), strict=True)]
        save = self._options.cpu_save and isinstance(source, Dense)
        needed = list(range(source.num_experts)) if save else sorted({e for e in here if e is not None})
        held = Experts.empty(
            max(1, len(needed)), source.hidden_size, source.intermediate_size, format=source.formats,
            activation=self._options.activation(source.activation), has_gate=source.has_gate,
        )  # fmt: skip
        held.set_biases(**{name: bias[needed or [0]] for name, bias in source.biases().items()})
        for place, expert in enumerate(needed):
            source.read(expert, held, place)
        if notice := source.notice():
            warnings.warn(notice, stacklevel=3)
        if save:
            held.save(str(self._options.weight_path), self.layer_idx)
        place_of = {expert: place for place, expert in enumerate(needed)}
        return held.select([None if expert is None else place_of[expert] for expert in here])

    def _chosen(self, slots: Tensor, count: int) -> list[int]:
        """The model's expert of each slot, checked."""
        if tuple(slots.shape) != (self.num_experts,) or slots.is_floating_point() or slots.dtype == torch.bool:
            raise ArgumentError(
                f"physical_to_logical_map_cpu: expected int64 {[self.num_experts]}, found {slots.dtype} "
                f"{list(slots.shape)}"
            )
        chosen = slots.tolist()
        wrong = [expert for expert in chosen if not 0 <= expert < count]
        if wrong:
            raise ArgumentError(f"physical_to_logical_map_cpu: expected experts 0..{count - 1}, found {wrong[0]}")
        return chosen

    def _loaded(self) -> Experts:
        if self.experts is None:
            raise StateError("no weights are loaded: call load_weights() or load_weights_from_tensors() first")
        return self.experts

    def _batch(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of hidden [T,H], and ids and weights [T,K], on the CPU; ids of experts on the GPU are -1.

        Raises ArgumentError for other shapes, dtypes that are not those of such tensors, and ids out of range.
        """
        if hidden.dim() != 2 or hidden.shape[1] != self.hidden_size:
            raise ArgumentError(f"hidden: expected shape [tokens, {self.hidden_size}], found {list(hidden.shape)}")
        expected = [hidden.shape[0], self.num_experts_per_tok]
        for name, tensor in (("expert ids", ids), ("weights", weights)):
            if list(tensor.shape) != expected:
                raise ArgumentError(
                    f"{name}: expected shape {expected}, tokens and experts per token, found {list(tensor.shape)}"
                )
        if not hidden.is_floating_point() or not weights.is_floating_point():
            raise ArgumentError(f"expected hidden and weights of float dtypes, found {hidden.dtype}, {weights.dtype}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ArgumentError(f"expert ids: expected integers, found {ids.dtype}")
        ids = ids.detach().to("cpu", torch.int64, copy=True)
        if self.num_gpu_experts:
            ids = self._elsewhere(ids)
        dtype = torch.float32 if hidden.dtype == torch.float64 else hidden.dtype
        return hidden.detach().to("cpu", dtype, copy=True), ids, weights.detach().to("cpu", torch.float32, copy=True)

    def _elsewhere(self, ids: Tensor) -> Tensor:
        wrong = ids[(ids < -1) | (ids >= self.num_experts)]
        if len(wrong):
            raise ArgumentError(f"expert ids: expected -1 or 0..{self.num_experts - 1}, found {int(wrong[0])}")
        return ids.masked_fill(self.gpu_experts_mask[ids], -1)
