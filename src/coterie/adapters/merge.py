"""Merging an adapter into its base model: a plain checkpoint in the base's dtype, or a packed one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from coterie.adapters.folder import base_of, finished, read_adapter_config
from coterie.convert import convert_cpu
from coterie.errors import ArgumentError, CheckpointError
from coterie.formats import resolve
from coterie.hf.config import METHOD
from coterie.hf.loading import check_folder, from_pretrained
from coterie.hf.peft import factors

LORA = "default"


@dataclass(frozen=True)
class Merged:
    """What was written. Errors are relative (Frobenius norms), of the worst expert."""

    experts: int
    format: str
    rounding_error: float
    quantisation_error: float


def merge_adapter(adapter: Path, output: Path, model: str | None = None, experts: str = "bf16") -> Merged:
    """Writes the merged model to a new folder: `experts` "bf16" a plain checkpoint, "int8" or "int4" a packed one.

    The base may be plain or packed. Needs memory for the whole model in its dtype (a packed one in bf16).
    Raises ArgumentError for an adapter that does not fit, CheckpointError for damaged files.
    """
    resolve(experts)
    config = read_adapter_config(adapter)
    base = base_of(adapter, config, model)
    dense = load_dense(base)
    try:
        adapted = PeftModel.from_pretrained(dense, str(adapter))
    except (ValueError, RuntimeError) as error:
        raise ArgumentError(f"the adapter does not fit {base}: {' '.join(str(error).split())[:300]}") from error
    wrapped = [module for module in adapted.modules() if isinstance(module, ParamWrapper)]
    worst = max((merge_experts(wrapper) for wrapper in wrapped), default=0.0)
    merged = adapted.merge_and_unload()
    merged.config.use_cache = True
    with finished(output) as folder:
        if experts == "bf16":
            save(merged, base, folder)
            return Merged(len(wrapped), experts, worst, 0.0)
        plain = folder / "plain"
        save(merged, base, plain)
        del merged, adapted, dense
        packed = folder / "packed"
        report = convert_cpu(plain, packed, experts)
        for file in packed.iterdir():
            file.replace(folder / file.name)
        packed.rmdir()
        for file in plain.iterdir():
            file.unlink()
        plain.rmdir()
    return Merged(len(wrapped), experts, worst, max(error.worst for error in report.errors.values()))


def load_dense(base: str) -> Any:
    """The base model with plain weights; a packed one is dequantised to bf16."""
    if Path(base).is_dir():
        check_folder(Path(base))
    elif Path(base).is_absolute():
        raise CheckpointError(f"{base} is not there: give the base model with --model")
    stored = getattr(AutoConfig.from_pretrained(base), "quantization_config", None)
    if stored is None:
        return AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    if dict(stored).get("quant_method") != METHOD:
        raise ArgumentError(f"{base} is quantised by {dict(stored).get('quant_method')}; merge into the original model")
    dense = from_pretrained(base).dequantize()
    dense.set_experts_implementation("eager")
    return dense


@torch.no_grad()
def merge_experts(wrapper: ParamWrapper) -> float:
    """Adds the adapter to one parameter, an expert at a time, and takes it off; the worst expert's rounding error."""
    weight = wrapper.get_param()
    a, b = (factor.float() for factor in factors(wrapper, LORA))
    transposed = getattr(wrapper.get_base_layer(), "is_transposed", False)
    worst = 0.0
    for e in range(wrapper.num_experts):
        delta = wrapper.scaling[LORA] * (b[e] @ a[e])
        exact = weight[e].float() + (delta.T if transposed else delta)
        weight[e] = exact
        worst = max(worst, ((weight[e].float() - exact).norm() / exact.norm().clamp(min=1e-30)).item())
    wrapper.delete_adapter(LORA)
    return worst


def save(model: Any, base: str, folder: Path) -> None:
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
