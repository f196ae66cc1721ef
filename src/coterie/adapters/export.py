"""An adapter as servers want it: in the names of the base model's checkpoint, each expert's LoRA by itself."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.adapters.empty import ADAPTER, PREFIX, Adapted, adapt_empty
from coterie.adapters.folder import WEIGHTS, base_of, check_there, read_adapter_config
from coterie.checkpoints.folderwriter import new_folder
from coterie.errors import ArgumentError
from coterie.hf.modules import read_layouts
from coterie.hf.names import expert_names, parameters_of, stored_name
from coterie.hf.peft import factors, wrappers


@dataclass(frozen=True)
class Exported:
    """What was written. experts: those with a LoRA of their own; 0 where the checkpoint stores them stacked."""

    experts: int
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Module:
    """LoRA of one matrix: the module's name in the checkpoint, A [R, in], B [out, R], R and alpha."""

    name: str
    a: Tensor
    b: Tensor
    rank: int
    alpha: float


def export_adapter(adapter: Path, output: Path, model: str | None = None) -> Exported:
    """Writes an adapter to a new folder under the names that the base model's checkpoint has.

    Where the checkpoint stores each expert's matrices as tensors of their own (`...experts.5.w1.weight`), so does the
    export: `{PREFIX}...experts.5.w1.lora_{A,B}.weight`; a shared A of gate and up is written for both. Where it stores
    a layer's experts stacked (gpt-oss), the adapter keeps PEFT's names and shapes, as servers read such models'.
    Of the base model only config.json is read. Raises ArgumentError for an adapter that has no experts or does not fit
    the model, CheckpointError for a damaged one.
    """
    lora = read_adapter_config(adapter)
    base, revision = base_of(adapter, lora, model)
    check_there(base)
    adapted = adapt_empty(base, revision, lora, load_file(adapter / WEIGHTS))
    wrapped = adapted.experts()
    if not wrapped:
        raise ArgumentError(f"{adapter} adapts no experts (target_parameters); it is what servers read already")
    modules = list(single_experts(adapted))
    if modules:
        names = stored_names(adapted)
        tensors = rest(adapted, names)
        for module in modules:
            tensors[f"{PREFIX}{module.name}.lora_A.weight"] = module.a.clone()
            tensors[f"{PREFIX}{module.name}.lora_B.weight"] = module.b.contiguous()
        name_modules(adapted, modules, names)
    else:
        tensors = adapted.stored
    with new_folder(output) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        adapted.config.save_pretrained(str(folder))
    experts = sum(adapted.layouts[name].num_experts for name in wrapped) if modules else 0
    return Exported(experts, len(tensors), sum(t.nbytes for t in tensors.values()))


def single_experts(adapted: Adapted) -> Iterator[Module]:
    """LoRA of every expert's matrices, where the checkpoint stores them apart."""
    wrapped = adapted.experts()
    for (name, layout), own in zip(adapted.layouts.items(), read_layouts(adapted.own), strict=True):
        if name not in wrapped:
            continue
        names = expert_names(adapted.own, own, layout)
        for wrapper in wrappers(wrapped[name]):
            if wrapper.parameter_name in names.stacked:
                continue
            a, b = factors(wrapper, ADAPTER)
            for projection, split in layout.split_lora_b(wrapper.parameter_name, b).items():
                for e in range(layout.num_experts):
                    to = names.apart[e, projection].removesuffix(".weight")
                    yield Module(to, a[e], split[e], wrapper.r[ADAPTER], wrapper.lora_alpha[ADAPTER])


def stored_names(adapted: Adapted) -> dict[str, str]:
    """Parameters of the adapted model that are no experts', and what the checkpoint calls them."""
    experts = tuple(read_layouts(adapted.own))
    tensors = [stored_name(adapted.own, name) for name in adapted.own.state_dict() if not name.startswith(experts)]
    return parameters_of(adapted.plain, tensors)


def rest(adapted: Adapted, names: dict[str, str]) -> dict[str, Tensor]:
    """What the adapter has besides experts, under the checkpoint's names of the modules."""
    modules = [name for name, _ in adapted.changed()]
    found = {}
    for key, tensor in adapted.stored.items():
        inner = key.removeprefix(PREFIX)
        module = next(name for name in modules if inner.startswith(f"{name}."))
        if module not in adapted.layouts:
            found[f"{PREFIX}{stored_module(module, names)}{inner[len(module) :]}"] = tensor
    return found


def stored_module(module: str, names: dict[str, str]) -> str:
    """What a module with a weight is called in the checkpoint."""
    weight = f"{module}.weight"
    return names.get(weight, weight).removesuffix(".weight")


def name_modules(adapted: Adapted, experts: list[Module], names: dict[str, str]) -> None:
    """Has an adapter's configuration name what is written: modules, no parameters, and each one's rank and alpha."""
    config: LoraConfig = adapted.config
    ranks = {module.name: module.rank for module in experts}
    alphas = {module.name: module.alpha for module in experts}
    for name, module in adapted.changed():
        if name not in adapted.layouts and isinstance(module, BaseTunerLayer):
            to = stored_module(name, names)
            ranks[to], alphas[to] = module.r[ADAPTER], module.lora_alpha[ADAPTER]
    config.target_modules = sorted({name.rpartition(".")[2] for name in ranks})
    config.target_parameters = None
    config.rank_pattern, config.alpha_pattern = patterns(ranks, config.r), patterns(alphas, config.lora_alpha)


def patterns(values: Mapping[str, float], default: float) -> dict[str, float]:
    """PEFT's patterns for modules whose value is not the default: one for all layers and experts that agree."""
    kinds: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        escaped = re.escape(name)
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", escaped), {})[escaped] = value
    found: dict[str, float] = {}
    for kind, named in kinds.items():
        agreed = set(named.values())
        found |= {kind: agreed.pop()} if len(agreed) == 1 else named
    return {pattern: value for pattern, value in found.items() if value != default}
