"""Merging an adapter into its base model: a plain checkpoint in the base's dtype, or a packed one."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from coterie.adapters.empty import ADAPTER, adapt_empty
from coterie.adapters.folder import WEIGHTS, base_of, finished, read_adapter_config
from coterie.adapters.stream import StreamedMerge
from coterie.convert import convert_cpu
from coterie.errors import ArgumentError, CheckpointError
from coterie.formats import resolve
from coterie.hf.config import METHOD
from coterie.hf.loading import check_folder, from_pretrained
from coterie.hf.peft import factors


@dataclass(frozen=True)
class Merged:
    """What was written. Errors are relative (Frobenius norms), of the worst expert."""

    experts: int
    format: str
    rounding_error: float
    quantisation_error: float


def merge_adapter(adapter: Path, output: Path, model: str | None = None, experts: str = "bf16") -> Merged:
    """Writes the merged model to a new folder: `experts` "bf16" a plain checkpoint, "int8" or "int4" a packed one.

    A plain base is read and written an expert at a time. A packed base is dequantised in memory, as is a base under an
    adapter that is more than LoRA of experts and linear layers beside modules trained in full.
    Raises ArgumentError for an adapter that does not fit, CheckpointError for damaged files.
    """
    resolve(experts)
    config = read_adapter_config(adapter)
    base = base_of(adapter, config, model)
    quantised = check_base(base)
    stored = load_file(adapter / WEIGHTS)
    adapted = adapt_empty(base, config, stored)
    streamed = None if quantised else StreamedMerge(local(base), adapted, stored)
    with finished(output) as folder:
        plain = folder if experts == "bf16" else folder / "plain"
        plain.mkdir(exist_ok=True)
        if streamed is not None and streamed.possible:
            parameters, worst = streamed.parameters, streamed.write(plain)
        else:
            parameters, worst = merge_in_memory(adapter, base, plain)
        if experts == "bf16":
            return Merged(parameters, experts, worst, 0.0)
        packed = folder / "packed"
        report = convert_cpu(plain, packed, experts)
        for file in packed.iterdir():
            file.replace(folder / file.name)
        packed.rmdir()
        shutil.rmtree(plain)
    return Merged(parameters, experts, worst, max(error.worst for error in report.errors.values()))


def check_base(base: str) -> bool:
    """Whether the base is packed by coterie. Raises ArgumentError or CheckpointError for one that cannot be merged."""
    if Path(base).is_dir():
        check_folder(Path(base))
    elif Path(base).is_absolute():
        raise CheckpointError(f"{base} is not there: give the base model with --model")
    found = getattr(AutoConfig.from_pretrained(base), "quantization_config", None)
    if found is not None and dict(found).get("quant_method") != METHOD:
        raise ArgumentError(f"{base} is quantised by {dict(found).get('quant_method')}; merge into the original model")
    return found is not None


def local(base: str) -> Path:
    """The folder of a plain base model; one on the Hugging Face Hub is fetched."""
    return Path(base) if Path(base).is_dir() else Path(snapshot_download(base))


def merge_in_memory(adapter: Path, base: str, folder: Path) -> tuple[int, float]:
    """(parameters of experts merged, rounding error of the worst expert); the whole model is in memory."""
    dense = load_dense(base)
    try:
        adapted = PeftModel.from_pretrained(dense, str(adapter))
    except (ValueError, RuntimeError) as error:
        raise ArgumentError(f"the adapter does not fit {base}: {' '.join(str(error).split())[:300]}") from error
    wrapped = [module for module in adapted.modules() if isinstance(module, ParamWrapper)]
    worst = max((merge_experts(wrapper) for wrapper in wrapped), default=0.0)
    merged = adapted.merge_and_unload()
    merged.config.use_cache = True
    merged.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return len(wrapped), worst


def load_dense(base: str) -> Any:
    """The base model with plain weights; a packed one is dequantised to bf16."""
    if not check_base(base):
        return AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    dense = from_pretrained(base).dequantize()
    dense.set_experts_implementation("eager")
    return dense


@torch.no_grad()
def merge_experts(wrapper: ParamWrapper) -> float:
    """Adds the adapter to one parameter, an expert at a time, and takes it off; the worst expert's rounding error."""
    weight = wrapper.get_param()
    a, b = (factor.float() for factor in factors(wrapper, ADAPTER))
    transposed = getattr(wrapper.get_base_layer(), "is_transposed", False)
    worst = 0.0
    for e in range(wrapper.num_experts):
        delta = wrapper.scaling[ADAPTER] * (b[e] @ a[e])
        exact = weight[e].float() + (delta.T if transposed else delta)
        weight[e] = exact
        worst = max(worst, ((weight[e].float() - exact).norm() / exact.norm().clamp(min=1e-30)).item())
    wrapper.delete_adapter(ADAPTER)
    return worst
