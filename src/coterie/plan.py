"""Will this model fit, and how fast can it be: worked out from its config alone, without a weight being read.

The model is built by Transformers on the meta device and run there once, so what is counted is what would be loaded:
no table of models, and no formula for any kind of attention.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from coterie import formats
from coterie.checkpoints.folder import Folder, read_json
from coterie.errors import ArgumentError, CheckpointError, UnsupportedModelError
from coterie.formats import Format
from coterie.hf.layout import Layout
from coterie.hf.modules import read_layouts

RESERVE = 10**9  # bytes of RAM for Python, torch and the activations of a short prompt
TRACED_CONTEXT = 8192  # a longer cache is extrapolated from its growth here
TRACE = "coterie_trace"


@dataclass(frozen=True, slots=True)
class ExpertLayer:
    """The experts of one layer, and how many of them a token uses."""

    layout: Layout
    per_token: int

    def matrices(self) -> list[tuple[int, int]]:
        """(rows, columns) of an expert's matrices."""
        up = self.layout.intermediate_size, self.layout.hidden_size
        return [up, up, up[::-1]] if self.layout.has_gate else [up, up[::-1]]

    def expert_parameters(self) -> int:
        """Parameters of one expert, biases included."""
        return sum(rows * cols + (rows if self.layout.has_bias else 0) for rows, cols in self.matrices())

    def expert_nbytes(self, spec: Format) -> int:
        """Packed bytes of one expert, biases (float32) included."""
        packed = sum(sum(spec.matrix_nbytes(*sizes).values()) for sizes in self.matrices())
        return packed + (4 * sum(rows for rows, _ in self.matrices()) if self.layout.has_bias else 0)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What of a model takes memory; bytes are those of the bf16 model unless a format is named."""

    model_type: str
    experts: tuple[ExpertLayer, ...]
    rest_parameters: int  # everything but the experts
    rest_nbytes: int
    table_parameters: int  # of an embedding table that is not also the head: a token reads one row of it
    context: int
    cache_nbytes: int  # KV cache of one sequence of `context` tokens

    @property
    def parameters(self) -> int:
        experts = sum(layer.layout.num_experts * layer.expert_parameters() for layer in self.experts)
        return experts + self.rest_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token reads."""
        experts = sum(layer.per_token * layer.expert_parameters() for layer in self.experts)
        return experts + self.rest_parameters - self.table_parameters

    @property
    def rest_read_nbytes(self) -> int:
        """Bytes of everything but the experts that one token reads."""
        return self.rest_nbytes - 2 * self.table_parameters

    def experts_nbytes(self, spec: Format) -> int:
        return sum(layer.layout.num_experts * layer.expert_nbytes(spec) for layer in self.experts)

    def experts_read_nbytes(self, spec: Format) -> int:
        """Bytes of experts that one token reads."""
        return sum(layer.per_token * layer.expert_nbytes(spec) for layer in self.experts)


@dataclass(frozen=True, slots=True)
class Estimate:
    """One way to hold a model. All sizes in bytes."""

    format: str
    experts: int
    ram: int  # needed, RESERVE included
    vram: int  # needed, 0 when everything is on the CPU
    ram_short: int  # missing; 0 when it fits
    tokens_per_second: float  # upper bound of decoding: every byte that a token needs, read once at full bandwidth

    @property
    def fits(self) -> bool:
        return self.ram_short == 0


def estimate(anatomy: Anatomy, spec: Format, ram: int, vram: int, bandwidth: float) -> Estimate:
    """Places a model: experts in RAM; the rest and the KV cache in VRAM if they fit there, else in RAM too.

    `ram` and `vram` are bytes there are, `bandwidth` bytes per second read from RAM.
    """
    rest = anatomy.rest_nbytes + anatomy.cache_nbytes
    on_gpu = 0 < rest <= vram
    experts = anatomy.experts_nbytes(spec)
    needed = experts + RESERVE + (0 if on_gpu else rest)
    read = anatomy.experts_read_nbytes(spec)
    if not on_gpu:
        read += anatomy.rest_read_nbytes + anatomy.cache_nbytes
    return Estimate(
        format=spec.name,
        experts=experts,
        ram=needed,
        vram=rest if on_gpu else 0,
        ram_short=max(0, needed - ram),
        tokens_per_second=bandwidth / read,
    )


def inspect(path: str | Path, context: int = 4096) -> Anatomy:
    """The anatomy of the model whose folder or config.json is at `path`, for sequences of `context` tokens.

    Raises CheckpointError for a config that cannot be read, UnsupportedModelError for a model that coterie cannot run.
    """
    if context < 1:
        raise ArgumentError(f"context is {context} tokens, expected at least 1")
    config = read_config(Path(path))
    model = build(config)
    layouts = {model.get_submodule(name): layout for name, layout in read_layouts(model).items()}
    cache, per_token = trace(model, min(context, TRACED_CONTEXT))
    if context > TRACED_CONTEXT:
        step = TRACED_CONTEXT // 128
        growth = (cache - trace(model, TRACED_CONTEXT - step)[0]) / step
        cache += int(growth * (context - TRACED_CONTEXT))

    in_experts = {p for module in layouts for p in module.parameters()}
    rest = [p for p in model.parameters() if p not in in_experts]
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is not None and head.weight is table
    return Anatomy(
        model_type=config.model_type,
        experts=tuple(ExpertLayer(layout, per_token[module]) for module, layout in layouts.items()),
        rest_parameters=sum(p.numel() for p in rest),
        rest_nbytes=sum(p.nbytes for p in rest),
        table_parameters=0 if tied else table.numel(),
        context=context,
        cache_nbytes=cache,
    )


def read_config(path: Path) -> Any:
    """The Transformers config of a model folder or of a config file."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file} does not exist: expected a model folder with a config.json, or a config file")
    values = read_json(file)
    values.pop("quantization_config", None)
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(f"{file}: model_type is {model_type!r}, which this Transformers does not know")
    try:
        return CONFIG_MAPPING[model_type].from_dict(values)
    except Exception as error:  # Transformers' own checks of the values, which have no common type
        raise CheckpointError(f"{file} is no valid {model_type} config: {error}") from error


def build(config: Any) -> Any:
    """The model in bf16 on the meta device: shapes and no storage."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise UnsupportedModelError(f"{config.model_type} cannot be built as a causal LM: {error}") from error
    return model.eval()


def trace(model: Any, context: int) -> tuple[int, dict[Any, int]]:
    """(bytes of the KV cache after `context` tokens, {experts module: experts a token uses}), from one run on meta."""
    per_token: dict[Any, int] = {}

    def record(module: Any, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        per_token[module] = ids.shape[-1]
        return torch.empty_like(hidden)

    ALL_EXPERTS_FUNCTIONS.register(TRACE, record)
    model.set_experts_implementation(TRACE)
    ids = torch.zeros(1, context, dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    except Exception as error:  # a model's own forward, run on a config that nothing has checked
        raise UnsupportedModelError(f"{model.config.model_type} with this config does not run: {error}") from error
    return _tensor_nbytes(cache, set()), per_token


def _tensor_nbytes(value: Any, visited: set[int]) -> int:
    """Bytes of every tensor that a cache holds, whatever its kind."""
    if id(value) in visited:
        return 0
    visited.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(_tensor_nbytes(v, visited) for v in value.values())
    if isinstance(value, (list, tuple)):
        return sum(_tensor_nbytes(v, visited) for v in value)
    return _tensor_nbytes(vars(value), visited) if hasattr(value, "__dict__") else 0


def stored_nbytes(path: str | Path) -> dict[str, int]:
    """{dtype: bytes} of the checkpoint in folder `path`, from its safetensors headers; {} where it has none."""
    path = Path(path)
    if not path.is_dir() or not any(path.glob("*.safetensors")):
        return {}
    folder, total = Folder(path), Counter[str]()
    for shard in folder.shards:
        for entry in folder.file(shard).entries.values():
            total[entry.dtype] += entry.nbytes
    return dict(total)


def choices(name: str | None = None) -> list[Format]:
    """The formats to compare: all that experts can be packed into, or the one named."""
    return [formats.resolve(n) for n in ([name] if name else formats.FORMATS)]
