"""Adapters whose LoRA of experts others laid out in other ways, in the way in which PEFT has it now."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from packaging.version import InvalidVersion, Version
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from coterie.adapters.empty import CLASSES, PREFIX, adapt_empty
from coterie.adapters.folder import TASKS, WEIGHTS, base_of, check_there, read_adapter_config
from coterie.checkpoints.folderwriter import new_folder
from coterie.checkpoints.gate_up import join_gate_up
from coterie.errors import ArgumentError, CheckpointError, UnsupportedModelError
from coterie.hf.adapter_fit import SINCE, other_way_round
from coterie.hf.described import load_config
from coterie.hf.empty import empty_model
from coterie.hf.layout import Layout
from coterie.hf.modules import number_layers, read_layouts

KT_WEIGHTS = "fused_expert_lora.safetensors"
Pair = tuple[Tensor, Tensor]  # A [E, R, in] and B [E, out, R]


@dataclass(frozen=True)
class Converted:
    """What was written. experts: those whose LoRA was laid out anew."""

    experts: int
    tensors: int
    nbytes: int


def convert_adapter(adapter: Path, output: Path, written_by: str, model: str | None = None) -> Converted:
    """Writes an adapter to a new folder in the layout of PEFT 0.19.1 and newer.

    written_by: one of WRITERS. Of the base model only config.json is read. Raises ArgumentError for an adapter that was
    not written so, has no experts, or does not fit the model, CheckpointError for a damaged one.
    """
    if written_by not in WRITERS:
        raise ArgumentError(f"--from is {written_by!r}: expected one of {', '.join(WRITERS)}")
    lora = read_adapter_config(adapter)
    base, revision = base_of(adapter, lora, model)
    check_there(base)
    stored = load_file(adapter / WEIGHTS)
    layouts = experts_of(base, revision, lora.task_type or TASKS[0], stored)
    changed = WRITERS[written_by](adapter, lora, layouts, stored)
    if not changed:
        raise ArgumentError(f"{adapter} has no LoRA of experts that is laid out in another way now: use it as it is")
    stored |= changed
    lora.peft_version = peft.__version__
    adapted = adapt_empty(base, revision, lora, stored)
    tensors = {key: tensor.contiguous() for key, tensor in adapted.stored.items()}
    with new_folder(output) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        adapted.config.save_pretrained(str(folder))
    experts = sum(layout.num_experts for name, layout in layouts.items() if any(f"{name}." in key for key in changed))
    return Converted(experts, len(tensors), sum(tensor.nbytes for tensor in tensors.values()))


def experts_of(base: str, revision: str | None, task: str, stored: dict[str, Tensor]) -> dict[str, Layout]:
    """The experts modules of the model by name, in the class whose names the adapter's tensors have."""
    config, found = load_config(base, revision=revision), []
    for auto in CLASSES[task]:
        try:
            model = empty_model(config, auto)
        except UnsupportedModelError:
            continue
        modules = [name for name, _ in model.named_modules() if name]
        fits = sum(any(key.startswith(f"{PREFIX}{name}.") for name in modules) for key in stored)
        found.append((fits, read_layouts(model)))
    if not found:
        raise ArgumentError(f"{base} cannot be opened as a model for {task}, which the adapter is for")
    return max(found, key=lambda pair: pair[0])[1]


def from_old_peft(adapter: Path, lora: LoraConfig, layouts: dict[str, Layout], stored: dict[str, Tensor]) -> dict:
    """PEFT before 0.19.1 had the input and the output of most experts the other way round."""
    version = version_of(lora)
    if version is not None and version >= SINCE:
        raise ArgumentError(
            f"{adapter} was saved by PEFT {version}, which lays LoRA of experts out as it is now: use it as it is"
        )
    changed = {}
    for layout, a_key, b_key in pairs(layouts, stored):
        if other_way_round(version, layout.is_transposed):
            a, b = by_expert(stored[a_key], stored[b_key], layout.num_experts)
            changed[a_key], changed[b_key] = as_peft(b.mT, a.mT)
    return changed


def from_unsloth(adapter: Path, lora: LoraConfig, layouts: dict[str, Layout], stored: dict[str, Tensor]) -> dict:
    """Unsloth wrote the columns of B by expert first, by rank second, until September 2026."""
    version = version_of(lora)
    if version is None or version < SINCE:
        raise ArgumentError(
            f"{adapter} was saved with PEFT {lora.peft_version}: what Unsloth made of the layout that PEFT had before "
            f"{SINCE} is not known; train it again"
        )
    changed = {}
    for layout, a_key, b_key in pairs(layouts, stored):
        a, _ = by_expert(stored[a_key], stored[b_key], layout.num_experts)
        b = stored[b_key].unflatten(1, (layout.num_experts, -1)).transpose(0, 1)
        changed[a_key], changed[b_key] = as_peft(a, b)
    return changed


def from_kt(adapter: Path, lora: LoraConfig, layouts: dict[str, Layout], stored: dict[str, Tensor]) -> dict:
    """kt-kernel writes A [E, R, in] and B [E, out, R] of gate, up and down into a file of its own.

    gate and up, one parameter to PEFT, get both ranks: each has zeros where the other has numbers. The configuration is
    changed: it names the parameters, and the modules that have tensors.
    """
    path = adapter / KT_WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{adapter} has no {KT_WEIGHTS}: expected an adapter whose experts kt-kernel trained")
    experts, changed, numbers = load_file(path), {}, number_layers(list(layouts))
    known = {f"layers.{number}.experts." for number in numbers.values()}
    strange = [key for key in experts if not any(key.startswith(stem) for stem in known)]
    if strange:
        raise CheckpointError(
            f"{path}, tensor {strange[0]}: expected layers.N.experts. before it, N one of {sorted(numbers.values())}"
        )
    for name, layout in layouts.items():
        stem = f"layers.{numbers[name]}.experts."
        found = {key.removeprefix(stem): tensor for key, tensor in experts.items() if key.startswith(stem)}
        if not found:
            continue
        missing = [key for key in (f"{p}_lora_{x}" for p in ("gate", "up", "down") for x in "ab") if key not in found]
        if missing or not layout.has_gate:
            raise CheckpointError(f"{path} has no tensor {stem}{missing[0] if missing else 'up_proj'}")
        gate, up = ((found[f"{part}_lora_a"], found[f"{part}_lora_b"]) for part in ("gate", "up"))
        first = torch.cat((gate[0], up[0]), 1), beside(gate[1], up[1], layout)
        inner, outer = f"{PREFIX}{name}.base_layer", f"{PREFIX}{name}"  # PEFT wraps in the order of the parameters
        for key, pair in ((inner, first), (outer, (found["down_lora_a"], found["down_lora_b"]))):
            changed[f"{key}.lora_A.weight"], changed[f"{key}.lora_B.weight"] = as_peft(*pair)
    lora.target_modules = sorted({key.removeprefix(PREFIX).rpartition(".lora_")[0] for key in stored})
    lora.target_parameters = ["experts.gate_up_proj", "experts.down_proj"]
    both = r".*\.gate_up_proj"
    lora.rank_pattern |= {both: 2 * lora.r}
    lora.alpha_pattern |= {both: lora.lora_alpha * (math.sqrt(2) if lora.use_rslora else 2)}
    return changed


WRITERS: dict[str, Callable[[Path, LoraConfig, dict[str, Layout], dict[str, Tensor]], dict[str, Tensor]]] = {
    "peft-0.19.0": from_old_peft,
    "unsloth": from_unsloth,
    "kt": from_kt,
}


def version_of(lora: LoraConfig) -> Version | None:
    """Of the PEFT that saved an adapter; None where it does not say."""
    try:
        return Version(str(lora.peft_version).partition("@")[0])
    except InvalidVersion:
        return None


def pairs(layouts: dict[str, Layout], stored: dict[str, Tensor]) -> Iterator[tuple[Layout, str, str]]:
    """The names of A and B of experts' parameters. Raises CheckpointError for one without the other, or of other sizes
    than a rank for each expert."""
    for name, layout in layouts.items():
        stem = re.compile(re.escape(f"{PREFIX}{name}") + r"(\.base_layer)*\.lora_A\.weight")
        for a_key in [key for key in stored if stem.fullmatch(key)]:
            b_key = a_key.replace(".lora_A.", ".lora_B.")
            ranks = stored[a_key].shape[0]
            if b_key not in stored or stored[b_key].shape[1] != ranks or ranks % layout.num_experts:
                raise CheckpointError(
                    f"{a_key} {list(stored[a_key].shape)}: expected as many rows as {b_key} has columns, a multiple of "
                    f"{layout.num_experts} experts"
                )
            yield layout, a_key, b_key


def by_expert(a: Tensor, b: Tensor, experts: int) -> Pair:
    """A [E, R, in] and B [E, out, R] of PEFT's A [E*R, in] and B [out, R*E]."""
    return a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)


def as_peft(a: Tensor, b: Tensor) -> Pair:
    """The inverse of `by_expert`."""
    return a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()


def beside(gate: Tensor, up: Tensor, layout: Layout) -> Tensor:
    """B [E, 2I, 2R] of gate and up together, out of B [E, I, R] of each."""
    gate, up = torch.cat((gate, torch.zeros_like(up)), 2), torch.cat((torch.zeros_like(gate), up), 2)
    return join_gate_up(gate, up, 1, not layout.is_concatenated)
