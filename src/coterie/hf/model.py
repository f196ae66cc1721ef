"""What a packed model does differently from the Transformers model it is: saving, casting, and counting its bytes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from coterie.checkpoints.folderwriter import replaced_folder
from coterie.checkpoints.packed_formats import ModelFormats
from coterie.checkpoints.packed_write import write_layer
from coterie.errors import ArgumentError
from coterie.hf.dense import packed_linears
from coterie.hf.inference import cache, graphs, sampling
from coterie.hf.inference.attention import attend_as_before, attend_here
from coterie.hf.inference.delta import attend_linearly
from coterie.hf.inference.gated import join_gates
from coterie.hf.inference.growing import grow_in_place
from coterie.hf.inference.latent import attend_to_latents
from coterie.hf.inference.quick import quicken
from coterie.hf.inference.step import step_at_once
from coterie.hf.linears import save_linears
from coterie.hf.mixed import mixed
from coterie.hf.modules import number_layers, packed_modules
from coterie.hf.saving import write_index
from coterie.hf.weight import PackedWeight

PEFT_PREFIX = "base_model.model."


class PackedModel:
    """Mixed into the class of a model whose experts are packed."""

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel leaves alone: each process keeps its own packed experts.

        It asks the module it wraps, and a PeftModel passes the question on: hence the names with PEFT's prefix too.
        """
        names = [name for name, p in self.named_parameters() if isinstance(p, PackedWeight)]
        return names + [PEFT_PREFIX + name for name in names]

    def extra_repr(self) -> str:
        """What print(model) says of the whole model."""
        packed = dict(packed_modules(self))
        experts = [module.experts for module in packed.values()]
        if not experts:
            return super().extra_repr()
        nbytes = sum(e.nbytes for e in experts)
        linears = [linear for _, linear in packed_linears(self)]
        dense = sum(linear.nbytes for linear in linears)
        rest = self.get_memory_footprint() - nbytes - dense
        formats = ModelFormats.of({n: packed[name].experts.formats for name, n in number_layers(list(packed)).items()})
        said = f"experts packed as {formats.described}: {nbytes / 1e6:,.1f} MB"
        if linears:
            specs = " and ".join(spec.described for spec in dict.fromkeys(linear.spec for linear in linears))
            said += f"; {len(linears)} linear layers as {specs}: {dense / 1e6:,.1f} MB"
        return f"{said}; the rest {str(self.dtype).removeprefix('torch.')}: {rest / 1e6:,.1f} MB"

    def train(self, mode: bool = True) -> PreTrainedModel:
        """Sets the mode; once a model has been in training its experts compute as in training, see `Experts`.

        Raises ArgumentError for training where the experts' activations are to be int8.
        """
        if mode:
            for _, packed in packed_modules(self):
                packed.experts.adapt()
            for _, linear in packed_linears(self):
                linear.adapt()
        return super().train(mode)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], mode: Any, batch_size: int, length: int
    ) -> Any:
        """As Transformers has it, of fixed size where that decodes as a CUDA graph."""
        given = model_kwargs.get(cache.NAME)
        if given is None:
            graphs.fix_cache(self, generation_config, mode, batch_size, length)
        else:
            graphs.check_cache(given, length)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, mode, batch_size, length)

    def get_compiled_call(self, compile_config: Any) -> Any:
        """What decodes with a cache of fixed size: a CUDA graph, where nothing else is asked for."""
        if compile_config is None and graphs.usable(self):
            return graphs.GraphedForward(self)
        return super().get_compiled_call(compile_config)

    def _sample(
        self, input_ids: Any, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Any:
        """As Transformers has it, drawing tokens faster."""
        found = sampling.draw_instead(logits_processor, generation_config, input_ids)
        processors, settings = found or (logits_processor, generation_config)
        return super()._sample(input_ids, processors, stopping_criteria, settings, **kwargs)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers has it, which knows its own kinds of attention only."""
        attend_as_before(self)
        return super().init_continuous_batching(*args, **kwargs)

    def half(self) -> PreTrainedModel:
        """Casts the rest of the model to float16; packed experts stay as they are, in any dtype."""
        return self.to(torch.float16)

    def float(self) -> PreTrainedModel:
        """Casts the rest of the model to float32; packed experts stay as they are, in any dtype."""
        return self.to(torch.float32)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the model: packed experts, other parameters, and buffers."""
        tensors = [p for p in self.parameters() if not isinstance(p, PackedWeight)]
        if return_buffers:
            tensors += self.buffers()
        experts = sum(packed.experts.nbytes for _, packed in packed_modules(self))
        return sum(t.nbytes for t in tensors) + experts + sum(linear.nbytes for _, linear in packed_linears(self))

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs) -> None:
        """Writes a packed checkpoint, which loads again with bit-equal logits; arguments as Transformers has them.

        With adapters on the model only those are saved, as ever. A checkpoint that is there, the model's own maybe, is
        replaced when the new one is whole: until then there must be room for both.
        Raises CheckpointError when the system refuses a write.
        """
        packed = dict(packed_modules(self))
        if not packed or not is_main_process or getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            raise ArgumentError("push_to_hub is not supported for packed models: save to a folder, then `hf upload` it")
        if kwargs.get("variant"):
            raise ArgumentError(f"variant={kwargs['variant']!r} is not supported for packed models: use another folder")
        folder = Path(save_directory)
        numbers = number_layers(list(packed))
        with replaced_folder(folder, self.get_memory_footprint(return_buffers=False)) as new:
            for name, module in packed.items():
                write_layer(new, numbers[name], module.experts, source=Path(self.config.name_or_path).name)
            save_linears(self, new)
            super().save_pretrained(new, **kwargs)
            write_index(new)


def become_packed(model: PreTrainedModel) -> None:
    """Makes a model a `PackedModel` too: its class becomes a subclass of the same name."""
    if not isinstance(model, PackedModel):
        model.__class__ = mixed(PackedModel, type(model))


def compute_here(model: PreTrainedModel) -> None:
    """Has a model attend and compute norms and routers by the engine, or on a GPU by kernels, and one that is in RAM
    append to its caches and take tokens through whole layers too."""
    attend_here(model)
    quicken(model)
    if model.device.type == "cpu":
        grow_in_place(model)
        attend_linearly(model)
        attend_to_latents(model)
        join_gates(model)
        step_at_once(model)
