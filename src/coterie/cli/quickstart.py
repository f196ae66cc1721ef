"""coterie quickstart: the bundled model packed, measured, put to work and fine-tuned."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from coterie.cli.console import console, errors, significant, size, table

FORMATS = ("bf16", "int8", "int4")
PROMPTS = ('The "with" statement is', "When an exception is raised,")
PROMPT_TOKENS = 128
TOKENS = 60


def quickstart() -> None:
    """Pack the small model that ships with coterie, compare it with Transformers, let it write, and fine-tune it.

    Needs no download and no GPU; takes about two minutes. The model has 3.6 million parameters and was trained for
    minutes on Python's own documentation: it writes like that documentation, not about it. Fine-tuned on its int4
    experts, it learns to answer questions.
    """
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=errors, transient=True) as progress, tempfile.TemporaryDirectory() as folder:
        task = progress.add_task("importing torch and transformers")

        def doing(what: str) -> None:
            progress.update(task, description=what)
            if not errors.is_terminal:
                errors.print(what, highlight=False)

        report, model, tokenizer = compare(Path(folder), doing)
        console.print(report)
        console.print(
            "The model is tiny, so its speed is mostly that of Python around it; "
            "for a layer of real size: [bold]coterie bench layer[/]",
            style="dim",
        )
        doing("generating text")
        for prompt in PROMPTS:
            console.print(f"\n[bold]{escape(prompt)}[/]", end="", highlight=False)
            console.print(escape(write(model, tokenizer, prompt)), highlight=False)
        try:
            from coterie.cli.quickstart_tune import fine_tune
        except ImportError as error:
            console.print(f"\nTo see it fine-tuned, install {error.name}: pip install 'coterie\\[train]'", style="dim")
        else:
            fine_tune(Path(folder, "int4"), Path(folder, "tuned"), tokenizer, doing)
    console.print(
        "\nNext: [bold]coterie doctor[/] (this machine), [bold]coterie plan MODEL[/] (will it fit), "
        "[bold]coterie convert cpu -i MODEL -o PACKED[/], [bold]coterie sft --init FILE[/] (fine-tune)",
        highlight=False,
    )


def compare(folder: Path, doing: Any) -> tuple[Any, Any, Any]:
    """(the table of results, the int4 model, its tokenizer); packed checkpoints are written to `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    import coterie
    from coterie import tiny
    from coterie.bench.decode import Decoder, Prefill
    from coterie.bench.timing import take_turns
    from coterie.convert import convert_cpu

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    ids = torch.tensor(tokenizer(tiny.heldout_text())["input_ids"])
    AutoModelForCausalLM.from_pretrained(tiny.PATH)  # the first load imports much; the timed ones do not
    models: dict[str, Any] = {}
    loading: dict[str, float] = {}
    nbytes: dict[str, int] = {}

    def load(name: str, function: Any, path: Path, **options: Any) -> None:
        start = time.perf_counter()
        models[name] = function(path, **options)
        loading[name] = time.perf_counter() - start
        nbytes[name] = sum(file.stat().st_size for file in path.glob("*.safetensors"))

    doing("loading the model with Transformers alone")
    load("transformers bf16", AutoModelForCausalLM.from_pretrained, tiny.PATH, dtype=torch.bfloat16)
    for format in FORMATS:
        doing(f"packing the experts into {format} and loading them")
        path = folder / format
        convert_cpu(tiny.PATH, path, format)
        load(f"coterie {format}", coterie.from_pretrained, path)

    doing("measuring perplexity on held-out text")
    quality = {name: tiny.perplexity(model, ids) for name, model in models.items()}
    doing("measuring speed")
    prompt = ids[None, :PROMPT_TOKENS]
    prefill = take_turns({name: Prefill(model, prompt) for name, model in models.items()}, 0.3, 3)
    decode = take_turns({name: Decoder(model, prompt) for name, model in models.items()}, 0.3, 3)

    report = table(
        "The bundled model (4 layers, 16 experts each, 3.6M parameters) on this machine",
        "",
        "on disk",
        "load s",
        "perplexity",
        "prompt tok/s",
        "decode tok/s",
    )
    for name in models:
        report.add_row(
            name,
            size(nbytes[name]),
            significant(loading[name]),
            f"{quality[name]:.2f}",
            significant(PROMPT_TOKENS / prefill.seconds(name)),
            significant(1 / decode.seconds(name)),
        )
    return report, models["coterie int4"], tokenizer


def write(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model writes after `prompt`: sampled, from a fixed seed."""
    import torch

    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt")
    out = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=TOKENS,
        do_sample=True,
        temperature=0.4,
        top_k=40,
        repetition_penalty=1.15,
    )
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
