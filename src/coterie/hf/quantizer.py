"""The HfQuantizer behind CoterieConfig: coterie packs the experts or opens them packed, Transformers loads the rest.

Order of events in from_pretrained: the model is built on the meta device; layouts are read and the experts' parameters
leave the state dict; every expert tensor is found and checked; of a quantised checkpoint, what is quantised of the rest
is dequantised and leaves the state dict too; Transformers loads the rest; experts are packed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightTransform
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging

from coterie import cpu, memory
from coterie.checkpoints.codes import Codes
from coterie.checkpoints.folder import PACKED_INDEX
from coterie.checkpoints.packed import UNFINISHED, layer_file, read_layout
from coterie.checkpoints.packed_formats import OWN
from coterie.checkpoints.packed_read import open_layer
from coterie.checkpoints.tensorfile import TensorFile
from coterie.errors import ArgumentError, CheckpointError, UnsupportedModelError
from coterie.experts import Experts
from coterie.formats import Format
from coterie.gpu.choice import streamed
from coterie.gpu.device import usable
from coterie.hf.config import METHOD, NO_FORMAT, CoterieConfig
from coterie.hf.dense import detach, packed_linears
from coterie.hf.experts import NAME
from coterie.hf.layout import Layout
from coterie.hf.linears import ModelLinears
from coterie.hf.model import become_packed, compute_here
from coterie.hf.modules import (
    attach,
    formats_by_name,
    hide_parameters,
    number_layers,
    packed_modules,
    read_layouts,
    remove_hooks,
    unpack,
)
from coterie.hf.quantised import Quantised, open_quantised, read_experts
from coterie.hf.room import choose
from coterie.hf.sizes import loaded_nbytes
from coterie.hf.sources import Sources
from coterie.hf.weight import PackedWeight

SPREAD = ("balanced", "balanced_low_0", "sequential", "disk")  # what Transformers takes for more devices than one
logger = logging.get_logger(__name__)
PACKED_FILE = re.compile(r"(experts|linears)-\d+\.safetensors")


@register_quantizer(METHOD)
class CoterieQuantizer(HfQuantizer):
    """Loads a model with packed experts, from a plain (bf16, fp16, f32), quantised or packed (`pre_quantized`) one."""

    quantization_config: CoterieConfig
    requires_calibration = False

    def validate_environment(self, device_map: Any = None, **kwargs) -> None:
        self._device = device_of(device_map)
        if self.pre_quantized:
            self.quantization_config.check_asked()
        elif self.quantization_config.mmap:
            raise ArgumentError(
                "mmap=True needs a packed checkpoint, which this is not: `coterie convert cpu` it first"
            )

    def update_device_map(self, device_map: Any) -> Any:
        return device_map if device_map is None else {"": self._device}

    def update_attn_implementation(self, config: PretrainedConfig) -> PretrainedConfig:
        """Sees the config before any file is looked for: a packed checkpoint's index has a name of its own, by which
        Transformers without coterie does not find it."""
        check_not_distributed(config)
        if self.pre_quantized:
            config.transformers_weights = PACKED_INDEX
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs
    ) -> None:
        if self.pre_quantized:
            del model.config.transformers_weights
        self._model = model
        self._layouts = read_layouts(model)
        options = self.quantization_config
        if not checkpoint_files and options.gguf is None:
            raise ArgumentError("no checkpoint files: coterie packs experts from safetensors files, not a state dict")
        files = [Path(file) for file in checkpoint_files or ()]
        if options.gguf is not None:
            readers = read_experts(options.gguf, self._layouts, options.gguf.file.path)
            self._quantised = Quantised(None, readers, ())
            options.become(self._quantised.formats(options.asked))
        elif self.pre_quantized:
            self._folder = files[0].parent
            self._check_packed()
            # In place: Transformers goes on with the same list, and need not look into packed files.
            checkpoint_files[:] = [str(file) for file in files if not PACKED_FILE.fullmatch(file.name)]
        else:
            other = next((file for file in files if file.suffix != ".safetensors"), None)
            if other is not None:
                raise CheckpointError(
                    f"{other} is not a safetensors file: load it with transformers and save_pretrained() it"
                )
            self._quantised = open_quantised(files[0].parent, self._layouts)
            if self._quantised is None:
                self._files = [TensorFile(file) for file in files]
            else:
                options.become(self._quantised.formats(options.asked))
        self._formats = formats_by_name(options.packing, list(self._layouts))
        for name, layout in self._layouts.items():
            self._formats[name].check_columns(layout.hidden_size, layout.intermediate_size, f"{name}, ")
        self._moved = choose(
            options.gpu_experts, options.gpu_context, model, self._layouts, self._formats, self._device
        )
        self._streamed = streamed(options.gpu_experts)
        if options.dense == OWN and not self.pre_quantized:
            if self._quantised is None and options.dense_skip:
                raise ArgumentError(NO_FORMAT)
            if self._quantised is None or self._device.type != "cpu":
                self._leave_linears(model)
        if options.dense is not None and self._device.type != "cpu":
            raise ArgumentError(
                f"dense={options.dense!r}: packed linear layers compute on the CPU alone, found device {self._device}: "
                "use device='cpu', or a checkpoint whose linear layers are not packed, without dense "
                "(`coterie convert cpu --dense none`)"
            )
        packed = files if self.pre_quantized else []
        format_of = options.gguf.format_of if options.gguf is not None else None
        if format_of is None and not self.pre_quantized and self._quantised is not None:
            format_of = self._quantised.formats_of(model)
        self._linears = ModelLinears(model, options.dense, options.dense_skip, packed, format_of)
        needed = loaded_nbytes(
            model,
            self._layouts,
            self._formats,
            options.mmap,
            self._device.type == "cpu",
            [len(m) for m in self._moved],
        )
        needed -= self._linears.saved_nbytes(options.mmap)
        memory.require(needed, f"{type(model).__name__} with experts in {options.packing.name}")
        self._linears.hide()
        for name in self._layouts:
            module = model.get_submodule(name)
            hide_parameters(module)
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True
            model._keys_to_ignore_on_load_unexpected |= {rf"(^|\.){re.escape(name.partition('.')[2])}\."}
        model.set_experts_implementation(NAME)

    def update_weight_conversions(self, weight_conversions: list[WeightTransform], *_: Any) -> list[WeightTransform]:
        # Transformers before 5.22 does not give the model.
        if self.pre_quantized:
            return weight_conversions
        if self._quantised is None:
            self._sources = Sources(self._model, self._layouts, weight_conversions, self._files)
        else:
            self._hidden = self._quantised.load_rest(self._model, weight_conversions, self._linears.kept)
        return weight_conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> None:
        numbers = number_layers(list(self._layouts))
        description = "Opening experts" if self.pre_quantized else "Packing experts"
        layouts = logging.tqdm(self._layouts.items(), desc=description)
        for (name, layout), moved in zip(layouts, self._moved, strict=True):
            module, experts = model.get_submodule(name), self._load(name, layout, numbers[name])
            experts.activations = self.quantization_config.activations
            if moved:
                experts.move(self._device, moved)
            if self._streamed:
                experts.stream(self._streamed.from_tokens)
            attach(module, experts, layout)
            remove_hooks(module)
        options = self.quantization_config
        self._linears.load(options.mmap, options.activations, self._codes)
        if self.quantization_config.dense == OWN and not any(packed_linears(model)):
            self._leave_linears(model)
        become_packed(model)
        logger.info("%s: %s", type(model).__name__, model.extra_repr())
        compute_here(model)
        if self._device.type == "cpu":
            cpu.warn_of_spinning()
        self.quantization_config.gguf = model.config.quantization_config.gguf = None
        del self._model, self._layouts, self._formats, self._moved, self._streamed, self._linears
        if not self.pre_quantized and self._quantised is None:
            del self._sources, self._files
        elif not self.pre_quantized:
            for parameter in self._hidden:
                remove_hooks(model.get_submodule(parameter.rpartition(".")[0]))
            del self._quantised, self._hidden

    def _leave_linears(self, model: PreTrainedModel) -> None:
        """Says that no linear layers are packed."""
        for config in (self.quantization_config, model.config.quantization_config):
            config.dense, config.dense_skip = None, []

    def _check_packed(self) -> None:
        """Checks every layer's file against the model. Raises CheckpointError, naming the file, expected and found."""
        if (self._folder / UNFINISHED).exists():
            raise CheckpointError(f"{self._folder} was not finished ({UNFINISHED} is there): save or convert it again")
        for name, number in number_layers(list(self._layouts)).items():
            layout, file = self._layouts[name], layer_file(self._folder, number)
            if not file.exists():
                raise CheckpointError(f"{file} is missing: the packed experts of {name}")
            found, said = read_layout(TensorFile(file)), self.quantization_config.packing[number]
            layout.check_found(str(file), found)
            if found.formats != said:
                raise CheckpointError(
                    f"{file}: packed as {found.formats.described}, config.json says {said.described}"
                )

    def _load(self, name: str, layout: Layout, number: int) -> Experts:
        config = self.quantization_config
        if self.pre_quantized:
            return Experts.from_packed(open_layer(self._folder, number), mmap=config.mmap)
        if self._quantised is not None:
            return self._quantised.experts(name, self._formats[name], config.scale_search)
        return self._pack(name, layout)

    def _codes(self, name: str, spec: Format | None) -> Codes | None:
        """The codes of a linear layer that is quantised already, in that format or, without one, in its own."""
        if self.pre_quantized or self._quantised is None:
            return None
        weight, gguf = f"{name}.weight", self.quantization_config.gguf
        if gguf is not None:
            return gguf.codes(self._model.all_tied_weights_keys.get(weight, weight), spec)
        if weight not in self._hidden:
            return None
        found = self._hidden[weight].codes(self._quantised.folder, spec)
        self._hidden[weight].release(self._quantised.folder)
        return found

    def _pack(self, name: str, layout: Layout) -> Experts:
        config = self.quantization_config
        experts = Experts.empty(
            layout.num_experts,
            layout.hidden_size,
            layout.intermediate_size,
            format=self._formats[name],
            activation=layout.activation,
            has_gate=layout.has_gate,
        )
        for weight in layout.weights:
            for expert, parts in self._sources.read_experts(name, weight):
                for projection, matrix in parts.items():
                    try:
                        experts.pack_projection(projection, expert, matrix, scale_search=config.scale_search)
                    except ArgumentError as error:
                        raise CheckpointError(f"{name}.{weight}: {error}") from error
        biases = {}
        for parameter in layout.parameters:
            if parameter.endswith("_bias"):
                biases |= self._sources.read_bias(name, parameter)
        if biases:
            experts.set_biases(**biases)
        return experts

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        # Transformers gives config.dtype, which saving turns into a name.
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
        for name, _ in list(packed_modules(model)):
            unpack(model.get_submodule(name), dtype, model.device)
        for name, _ in list(packed_linears(model)):
            module, shared = model.get_submodule(name), model.all_tied_weights_keys.get(f"{name}.weight")
            detach(module, dtype)
            if shared is not None:
                module.weight = model.get_parameter(shared)
        model.set_experts_implementation(model.get_correct_experts_implementation(None))
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What Transformers is to save: all but the packed experts."""
        state = {name: value for name, value in model.state_dict().items() if not isinstance(value, PackedWeight)}
        return state, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether the model may be trained without an adapter: all of it but the experts."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def device_of(device_map: Any) -> torch.device:
    """The one device of a device map: experts are in RAM, all else goes there. "auto": a GPU if there is one.

    Raises ArgumentError for a map of several, DeviceError for a device that is not there.
    """
    devices = list(device_map.values()) if isinstance(device_map, dict) else [device_map]
    if len({str(device) for device in devices}) != 1 or str(devices[0]) in SPREAD:
        raise ArgumentError(
            f"device_map={device_map!r}: expected one device for all but the experts, which are in RAM: "
            "'cpu', 'cuda', 'cuda:1' or 'auto'"
        )
    if devices[0] == "auto":
        return usable("cuda" if torch.cuda.is_available() else "cpu")
    return usable("cpu" if devices[0] is None else devices[0])


def check_not_distributed(config: PretrainedConfig) -> None:
    """Raises UnsupportedModelError for a model that Transformers is to shard by experts or by tensors."""
    distributed = getattr(config, "distributed_config", None)
    for option in ("ep_size", "enable_expert_parallel", "tp_size"):
        value = getattr(distributed, option, None)
        if (value is not None and value > 1) or value is True:
            raise UnsupportedModelError(
                f"{option}={value}: packed experts are not sharded between processes, each keeps all of them: "
                "leave distributed_config out, and share batches by DistributedDataParallel or FSDP2 instead"
            )
