"""coterie convert gpu: experts for a GPU in other engines, by llm-compressor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.console import console, telling_of_ctrl_c


def gpu(
    model_id: Annotated[str, typer.Option("--model_id", "--model-id", help="Folder or hub id of a model in bf16.")],
    output_dir: Annotated[Path, typer.Option("--output_dir", "--output-dir", help="New or empty folder.")],
    quant_method: Annotated[
        str, typer.Option("--quant_method", "--quant-method", help="GPTQ, or RTN: rounding, without data.")
    ] = "GPTQ",
    quant_type: Annotated[str, typer.Option("--quant_type", "--quant-type", help="W4A16 or W8A16.")] = "W4A16",
    num_calibration_samples: Annotated[
        int, typer.Option("--num_calibration_samples", "--num-calibration-samples", help="Rows of the data set.")
    ] = 512,
    max_sequence_length: Annotated[
        int, typer.Option("--max_sequence_length", "--max-sequence-length", help="Tokens of a row, at most.")
    ] = 2048,
    dataset: Annotated[
        str, typer.Option(help="Hub id, folder, or .jsonl, .json or .parquet file, of chats (messages) or text.")
    ] = "HuggingFaceH4/ultrachat_200k",
    dataset_split: Annotated[
        str, typer.Option("--dataset_split", "--dataset-split", help="Its split; a file has none.")
    ] = "train_sft",
    dampening_frac: Annotated[
        float, typer.Option("--dampening_frac", "--dampening-frac", help="Of GPTQ: what is added to the diagonal.")
    ] = 0.1,
    max_gpu_memory: Annotated[
        str | None, typer.Option("--max_gpu_memory", "--max-gpu-memory", help="Of each GPU, like 40GB.")
    ] = None,
    max_cpu_memory: Annotated[
        str | None, typer.Option("--max_cpu_memory", "--max-cpu-memory", help="For what does not fit there.")
    ] = None,
    force_cpu: Annotated[bool, typer.Option("--force_cpu", "--force-cpu", help="Use no GPU; takes long.")] = False,
    ignore_patterns: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore_patterns",
            "--ignore-patterns",
            help="A module that stays as it is, by name or re:PATTERN; may be repeated. "
            "[default: all but the routed experts]",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust_remote_code", "--trust-remote-code", help="Run code that comes with the model.")
    ] = False,
) -> None:
    """Quantise experts for a GPU with llm-compressor (pip install llmcompressor), in compressed-tensors' format.

    The model is loaded whole, by Transformers. Nothing is in the folder before all of it is.
    """
    from coterie.convert.gpu import IGNORED, GpuConversion, convert_gpu

    options = GpuConversion(
        model_id=model_id,
        output_dir=output_dir,
        quant_method=quant_method,
        quant_type=quant_type,
        num_calibration_samples=num_calibration_samples,
        max_sequence_length=max_sequence_length,
        dataset=dataset,
        dataset_split=dataset_split,
        dampening_frac=dampening_frac,
        max_gpu_memory=max_gpu_memory,
        max_cpu_memory=max_cpu_memory,
        force_cpu=force_cpu,
        ignore_patterns=tuple(ignore_patterns) if ignore_patterns else IGNORED,
        trust_remote_code=trust_remote_code,
    )
    with telling_of_ctrl_c(lambda: f"nothing is kept in {output_dir}"):
        convert_gpu(options)
    console.print(f"{output_dir}: {quant_type} by {quant_method}", markup=False, highlight=False, soft_wrap=True)
