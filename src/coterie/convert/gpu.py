"""Experts for a GPU in other engines: GPTQ or plain rounding to W4A16 or W8A16, by llm-compressor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coterie.checkpoints import packed
from coterie.checkpoints.folderwriter import new_folder
from coterie.checkpoints.quantised import says_quantised
from coterie.errors import ArgumentError
from coterie.memory import parse_bytes

METHODS = ("GPTQ", "RTN")
TYPES = ("W4A16", "W8A16")
# By default everything but the routed experts: heads, attention, routers, shared experts and layers without experts.
IGNORED = (
    "re:.*lm_head",
    r"re:.*\.(self_attn|linear_attn|attention)\..*",
    r"re:.*\.(gate|router|shared_expert_gate)$",
    r"re:.*\.shared_experts?\..*",
    r"re:.*\.mlp\.(gate|up|down|gate_up)_proj$",
)
BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
SEED = 0


@dataclass(frozen=True, kw_only=True)
class GpuConversion:
    """What is quantised, and how.

    quant_method: GPTQ, which needs rows of a data set, or RTN. ignore_patterns: modules that stay as they are, by name,
    or by a regular expression behind `re:`. Memory: sizes such as 40GB. Raises ArgumentError.
    """

    model_id: str
    output_dir: Path
    quant_method: str = "GPTQ"
    quant_type: str = "W4A16"
    num_calibration_samples: int = 512
    max_sequence_length: int = 2048
    dataset: str = "HuggingFaceH4/ultrachat_200k"
    dataset_split: str = "train_sft"
    dampening_frac: float = 0.1
    max_gpu_memory: str | None = None
    max_cpu_memory: str | None = None
    force_cpu: bool = False
    ignore_patterns: tuple[str, ...] = IGNORED
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("quant_method", METHODS), ("quant_type", TYPES)):
            if (found := getattr(self, name)) not in allowed:
                raise ArgumentError(f"--{name} is {found!r}: expected one of {', '.join(allowed)}")
        for name in ("num_calibration_samples", "max_sequence_length"):
            if (count := getattr(self, name)) < 1:
                raise ArgumentError(f"--{name} is {count}: expected at least 1")
        if not 0 < self.dampening_frac < 1:
            raise ArgumentError(f"--dampening_frac is {self.dampening_frac}: expected a fraction between 0 and 1")
        if self.force_cpu and self.max_gpu_memory is not None:
            raise ArgumentError("--max_gpu_memory and --force_cpu contradict each other: leave one of them out")
        for size in (self.max_gpu_memory, self.max_cpu_memory):
            if size is not None:
                parse_bytes(size)

    def loading(self) -> dict[str, Any]:
        """What Transformers loads the model with. Raises ArgumentError where there is no GPU and none was ruled out."""
        options = {"dtype": "auto", "trust_remote_code": self.trust_remote_code}
        if self.force_cpu:
            return options
        if not torch.cuda.is_available():
            raise ArgumentError("there is no GPU here: give --force_cpu to quantise on the CPU, which takes long")
        limits: dict[int | str, int] = {}
        if self.max_gpu_memory is not None:
            limits |= dict.fromkeys(range(torch.cuda.device_count()), parse_bytes(self.max_gpu_memory))
        if self.max_cpu_memory is not None:
            limits["cpu"] = parse_bytes(self.max_cpu_memory)
        return options | {"device_map": "auto"} | ({"max_memory": limits} if limits else {})


def convert_gpu(options: GpuConversion) -> None:
    """Writes the quantised model to a new folder, whole or not at all, in the format of compressed-tensors.

    Raises ArgumentError where llm-compressor is not installed, and for a model or a data set that cannot be read.
    """
    try:
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    except ImportError as error:
        raise ArgumentError(
            f"`coterie convert gpu` needs llm-compressor, of which {error.name} is missing: pip install llmcompressor"
        ) from None
    local = Path(options.model_id)
    if packed(local):
        raise ArgumentError(f"{local} is packed by coterie: quantise the checkpoint that it was made from")
    if local.is_dir() and says_quantised(local):
        raise ArgumentError(f"{local} is quantised already: `coterie convert dequantize` it first, or use the original")
    loading = options.loading()
    with new_folder(options.output_dir) as new:
        tokenizer = _opened(AutoTokenizer, options.model_id, trust_remote_code=options.trust_remote_code)
        calibration: dict[str, Any] = {}
        how = {"targets": "Linear", "scheme": options.quant_type, "ignore": list(options.ignore_patterns)}
        if options.quant_method == "GPTQ":
            recipe = GPTQModifier(**how, dampening_frac=options.dampening_frac)
            rows = calibration_rows(options, tokenizer)
            calibration = {
                "dataset": rows,
                "num_calibration_samples": len(rows),
                "max_seq_length": options.max_sequence_length,
            }
        else:
            recipe = QuantizationModifier(**how)
        model = _opened(AutoModelForCausalLM, options.model_id, **loading)
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe, **calibration)
        model.save_pretrained(new, save_compressed=True)
        tokenizer.save_pretrained(new)


def _opened(kind: Any, model_id: str, **options: Any) -> Any:
    try:
        return kind.from_pretrained(model_id, **options)
    except (OSError, ValueError) as error:
        raise ArgumentError(f"cannot open {model_id}: {str(error).splitlines()[0]}") from error


def calibration_rows(options: GpuConversion, tokenizer: Any) -> Any:
    """A data set of input_ids: random rows of chats (`messages`) or `text`, at most as many, and as long, as asked for.

    Raises ArgumentError for a data set that cannot be read, or has neither.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ArgumentError("GPTQ needs datasets: pip install datasets; RTN needs no data") from None
    file = Path(options.dataset)
    builder = BUILDERS.get(file.suffix)
    if builder is not None and not file.is_file():
        raise ArgumentError(f"{file} is not there")
    try:
        if builder is None:
            rows = load_dataset(options.dataset, split=options.dataset_split)
        else:
            rows = load_dataset(builder, data_files=str(file), split="train")
    except Exception as error:  # data sets fail in as many ways as there are readers
        raise ArgumentError(f"cannot read {options.dataset}: {type(error).__name__}: {error}") from error
    rows = rows.shuffle(seed=SEED).select(range(min(len(rows), options.num_calibration_samples)))
    is_chat = "messages" in rows.column_names
    if not is_chat and "text" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise ArgumentError(f"{options.dataset} has the columns {columns}: expected messages or text")
    if is_chat and tokenizer.chat_template is None:
        raise ArgumentError(f"{options.dataset} has chats, {options.model_id} no chat template: name one with text")

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False) if is_chat else row["text"]
        length = options.max_sequence_length
        return dict(tokenizer(text, truncation=True, max_length=length, add_special_tokens=not is_chat))

    return rows.map(tokenise, remove_columns=rows.column_names, desc="Reading")
