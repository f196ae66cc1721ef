"""An adapter as servers want it: each expert's LoRA as 2-D tensors under the names of its linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from coterie.adapters.folder import WEIGHTS, base_of, finished, read_adapter_config
from coterie.errors import ArgumentError
from coterie.hf.adapter_fit import check_fits, lora_shapes
from coterie.hf.layout import read_layout
from coterie.hf.peft import factors, wrappers

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Exported:
    """What was written."""

    experts: int
    tensors: int
    nbytes: int


def export_adapter(adapter: Path, output: Path, model: str | None = None) -> Exported:
    """Writes `{module}.{e}.{gate,up,down}_proj.lora_{A,B}.weight` for every expert e; the rest of the adapter as it is.

    A shared A of gate and up is written for both. The base model's weights are not read.
    Raises ArgumentError for an adapter that has no experts or does not fit the model, CheckpointError for a damaged
    one.
    """
    config = read_adapter_config(adapter)
    base = base_of(adapter, config, model)
    stored = load_file(adapter / WEIGHTS)
    wrapped = wrap_empty(base, config, stored)
    tensors: dict[str, Tensor] = {}
    consumed: set[str] = set()
    experts = 0
    ranks: dict[str, int] = {}
    for name, outer in wrapped.items():
        layout = read_layout(outer.get_base_layer())
        for depth, wrapper in enumerate(wrappers(outer)):
            key = f"{PREFIX}{name}.{'base_layer.' * depth}"
            for part in ("A", "B"):
                consumed.add(f"{key}lora_{part}.weight")
                weight = nn.Parameter(stored[f"{key}lora_{part}.weight"], requires_grad=False)
                getattr(wrapper, f"lora_{part}")["default"].weight = weight
            a, b = factors(wrapper, "default")
            for projection, split in layout.split_lora_b(wrapper.parameter_name, b).items():
                ranks[f"{projection}_proj"] = wrapper.r["default"]
                for e in range(layout.num_experts):
                    to = f"{PREFIX}{name}.{e}.{projection}_proj"
                    tensors[f"{to}.lora_A.weight"] = a[e].clone()
                    tensors[f"{to}.lora_B.weight"] = split[e].contiguous()
        experts += layout.num_experts
    if not experts:
        raise ArgumentError(f"{adapter} adapts no experts (target_parameters); it is what servers read already")
    tensors |= {key: value for key, value in stored.items() if key not in consumed}
    linear = config.target_modules if isinstance(config.target_modules, (set, list)) else ()
    config.target_modules = sorted({*linear, *ranks})
    config.target_parameters = None
    config.rank_pattern = {k: r for k, r in config.rank_pattern.items() if "experts" not in k}
    config.rank_pattern |= {k: r for k, r in ranks.items() if r != config.r}
    with finished(output) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
    return Exported(experts, len(tensors), sum(t.nbytes for t in tensors.values()))


def wrap_empty(base: str, config: LoraConfig, stored: dict[str, Tensor]) -> dict[str, ParamWrapper]:
    """The outermost wrappers that PEFT puts around the experts of the base model, by module name, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        config.inference_mode = True
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ArgumentError(f"the adapter does not fit {base}: {error}") from error
    check_fits(lora_shapes(adapted, "default"), stored, base, config.base_model_name_or_path)
    return {
        name: module
        for name, module in adapted.base_model.model.named_modules()
        if isinstance(module, ParamWrapper) and not name.endswith("base_layer")
    }
