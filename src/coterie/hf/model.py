"""What a packed model does differently from the Transformers model it is: saving, casting, and counting its bytes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from coterie.checkpoints.folder import INDEX, SINGLE
from coterie.checkpoints.packed import UNFINISHED
from coterie.checkpoints.packed_write import write_layer
from coterie.checkpoints.tensorfile import TensorFile
from coterie.checkpoints.tensorwriter import sync_folder, write_error, write_text
from coterie.errors import ArgumentError, CheckpointError
from coterie.hf.modules import number_layers, packed_modules
from coterie.hf.weight import PackedWeight

PEFT_PREFIX = "base_model.model."
SHARD = "model-00001-of-00001.safetensors"


class PackedModel:
    """Mixed into the class of a model whose experts are packed."""

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel leaves alone: each process keeps its own packed experts.

        It asks the module it wraps, and a PeftModel passes the question on: hence the names with PEFT's prefix too.
        """
        names = [name for name, p in self.named_parameters() if isinstance(p, PackedWeight)]
        return names + [PEFT_PREFIX + name for name in names]

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
        return sum(t.nbytes for t in tensors) + sum(packed.experts.nbytes for _, packed in packed_modules(self))

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs) -> None:
        """Writes a packed checkpoint, which loads again with bit-equal logits; arguments as Transformers has them.

        With adapters on the model only those are saved, as ever. Interrupted, it leaves no folder that looks whole.
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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / UNFINISHED, "{}\n")
            for stale in (folder / INDEX, folder / SINGLE, *folder.glob("experts-*.safetensors")):
                stale.unlink(missing_ok=True)
            for name, module in packed.items():
                write_layer(folder, numbers[name], module.experts, source=Path(self.config.name_or_path).name)
            super().save_pretrained(save_directory, **kwargs)
            if (folder / SINGLE).exists():
                os.replace(folder / SINGLE, folder / SHARD)
                write_index(folder)
            (folder / UNFINISHED).unlink()
            sync_folder(folder)
        except OSError as error:
            raise write_error(folder, error) from error
        except SafetensorError as error:
            raise CheckpointError(f"cannot write {folder}: {error}") from error


def write_index(folder: Path) -> None:
    """Writes the index of a checkpoint's one shard, by which Transformers finds it; experts' files are not in it."""
    entries = TensorFile(folder / SHARD).entries
    index = {
        "metadata": {"total_size": sum(entry.nbytes for entry in entries.values())},
        "weight_map": dict.fromkeys(entries, SHARD),
    }
    write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def become_packed(model: PreTrainedModel) -> None:
    """Makes a model a `PackedModel` too: its class becomes a subclass of the same name."""
    kind = type(model)
    if not issubclass(kind, PackedModel):
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        model.__class__ = type(kind.__name__, (PackedModel, kind), names)
