"""An adapter as servers want it: each expert's LoRA as 2-D tensors under the names of its linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.adapters.empty import ADAPTER, PREFIX, adapt_empty, lora_key, wrapped_experts
from coterie.adapters.folder import WEIGHTS, base_of, finished, read_adapter_config
from coterie.errors import ArgumentError
from coterie.hf.layout import read_layout
from coterie.hf.peft import factors, wrappers


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
    wrapped = wrapped_experts(adapt_empty(base, config, stored))
    tensors: dict[str, Tensor] = {}
    consumed: set[str] = set()
    experts = 0
    ranks: dict[str, int] = {}
    for name, outer in wrapped.items():
        layout = read_layout(outer.get_base_layer())
        for depth, wrapper in enumerate(wrappers(outer)):
            consumed |= {lora_key(name, depth, part) for part in "AB"}
            a, b = factors(wrapper, ADAPTER)
            for projection, split in layout.split_lora_b(wrapper.parameter_name, b).items():
                ranks[f"{projection}_proj"] = wrapper.r[ADAPTER]
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
