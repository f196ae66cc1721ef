"""coterie plan: will a model fit here, how fast will it be, and what does fine-tuning or converting it take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from coterie.cli.console import console, count, errors, significant, size, table

if TYPE_CHECKING:
    from coterie.checkpoints.packed_formats import ModelFormats
    from coterie.plan import Anatomy, Dense, Rates, Source


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A model's folder, its config.json alone or a hub id, of which weights are not needed; or a GGUF file."
        ),
    ],
    experts: Annotated[str | None, typer.Option(help="Only this format of experts: bf16, int8, int4, ...")] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            help="Linear layers outside the experts packed too, in this format: int8, ... [default: own, those that "
            "are quantised, as they are, in a GGUF file or a folder with weights; none: they are dequantised]"
        ),
    ] = None,
    context: Annotated[int, typer.Option(help="Tokens of one sequence, for the size of its KV cache.")] = 4096,
    ram: Annotated[
        str | None, typer.Option(help="RAM to plan for, like 64GB or 64 (gigabytes). [default: what is available here]")
    ] = None,
    vram: Annotated[
        str | None, typer.Option(help="VRAM of a GPU to plan for, like 24GB. [default: what is free on the GPU here]")
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="RAM read per second, like 50GB. [default: measured here]")
    ] = None,
    disk: Annotated[
        str | None, typer.Option(help="Disk read or written per second, for converting. [default: 500MB]")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Plan fine-tuning too: LoRA on attention and experts.")
    ] = False,
    lora_r: Annotated[int, typer.Option(help="With --train: the rank of LoRA.")] = 16,
    sequence_len: Annotated[int, typer.Option(help="With --train: tokens of a sequence.")] = 1024,
    micro_batch_size: Annotated[int, typer.Option(help="With --train: sequences of a forward pass.")] = 1,
) -> None:
    """Say whether this version opens a model, whether it fits in memory, and, predicted, how fast it will be.

    Builds the model without weights from its config, so it works before a download.
    """
    from transformers import logging

    from coterie import machine, memory
    from coterie import plan as planning

    logging.set_verbosity_error()
    given = {name: memory.parse_bytes(text) for name, text in (("bandwidth", bandwidth), ("disk", disk)) if text}
    here = memory.found()
    available = memory.parse_bytes(ram) if ram else here.available
    source = planning.open_source(model)
    formats = source.formats(experts)
    with errors.status("building the model without weights"):
        rest_format = source.dense_format(dense)
        anatomy = planning.inspect(source.config, context)
    linears = planning.dense(anatomy, rest_format, source.dense_skip) if rest_format else None
    own = source.dense is None and isinstance(rest_format, dict)
    print_verdict(source, anatomy, linears if own else None)

    with errors.status("measuring memory and arithmetic"):
        memory_rate = given.get("bandwidth") or machine.read_bandwidth()
        rates = planning.Rates(
            memory_rate,
            machine.dot_rate("bf16"),
            machine.dot_rate("int8"),
            min(memory_rate, machine.row_rate()),
            machine.attention_rate(),
            *planning.overhead(),
            planning.REACHED,
        )
        packing = {} if source.packed else {every.name: packing_rate(source, every) for every in formats}
    usable = planning.usable(available)
    what = "planned for, as given" if ram else f"available, of {size(here.total)} here"
    console.print(f"RAM: {size(available)} {what}; {size(usable)} after a margin of 5%.", highlight=False)
    report = table("", "experts in", "experts", "RAM needed", "", "decode", "prefill")
    impossible = []
    for every in formats:
        e = planning.estimate(anatomy, every, usable, rates, linears)
        speeds = significant(e.decode), significant(e.prefill)
        name = f"{e.format}, as it is" if every == source.own else e.format
        report.add_row(name, size(e.experts), size(e.ram), fits(e.ram_short), *speeds)
        if e.problem:
            impossible.append(f"Not as {e.format}: {e.problem}.")
    if source.quantised and source.quantised.bits and not source.own:
        nbytes = int(anatomy.expert_parameters * source.quantised.bits / 8)
        needed = e.ram - e.experts + nbytes
        room = ("-", "not opened") if source.problem else (size(needed), fits(max(0, needed - usable)))
        report.add_row(f"{source.quantised.name}, as it is", size(nbytes), *room, "-", "-")
    console.print(report)
    for line in impossible:
        console.print(line, style="red", highlight=False)
    rest = f"the rest in bf16 ({size(anatomy.rest_nbytes)})"
    if linears:
        rest = f"{linears.count} linear layers in {linears.described} ({size(linears.nbytes)}), "
        rest += f"what remains in bf16 ({size(anatomy.rest_nbytes - linears.saved - linears.nbytes)})"
    console.print(
        f"RAM needed: experts, {rest}, the KV cache of {context} tokens ({size(anatomy.cache_nbytes)}), and "
        f"{size(planning.RESERVE)} for Python and buffers.",
        style="dim",
        highlight=False,
    )
    print_rates(rates, context)
    print_placements(anatomy, formats, usable, vram, rates)
    if linears and linears.saved > 0 and source.dense is None and not own:
        console.print(
            f"Linear layers that are packed while a model loads take {size(linears.saved)} more until they are: "
            "`coterie convert cpu --dense` packs them beforehand.",
            highlight=False,
        )
    if linears is None:
        beside = source.own if source.own in formats else None
        print_sensible(anatomy, beside or next((every for every in formats if every.name == "int4"), formats[0]))
    if source.packed is None:
        print_conversion(source, anatomy, formats, packing, given.get("disk") or planning.DISK, linears)
    if train:
        print_training(source, anatomy, formats, usable, linears, lora_r, micro_batch_size, sequence_len)


def packing_rate(source: Source, formats: ModelFormats) -> float:
    """Bytes of experts in bf16 that are packed in a second; of those that keep their codes, as if they were in bf16."""
    from coterie import machine
    from coterie import plan as planning

    kept = formats == source.own
    return planning.keeping_rate(source.experts, formats) if kept else machine.packing_rate(formats.name)


def print_rates(rates: Rates, context: int) -> None:
    """What the predicted speeds are made of."""
    from coterie import plan as planning

    console.print(
        f"Tokens a second are predictions, from what was measured here. Decode, one sequence after {context} tokens: "
        f"packed weights and the cache are read at {size(rates.bandwidth)}/s, bf16 layers at "
        f"{size(rates.row or rates.bandwidth)}/s, and each layer takes {significant(1e3 * rates.layer)} ms besides. "
        f"Prefill, {planning.PROMPT} tokens: {significant(rates.bf16 / 1e9)} GFLOP/s in bf16, "
        f"{significant(rates.int8 / 1e9)} GOP/s in int8, {significant(rates.attention / 1e9)} GFLOP/s in attention. "
        f"Whole models reach {rates.reached:.0%} of that; `coterie bench model` measures some layers.",
        style="dim",
        highlight=False,
    )


def print_placements(
    anatomy: Anatomy, formats: list[ModelFormats], ram: int, vram: str | None, rates: Rates
) -> None:
    """Where the experts go with a GPU: the one here, or one of `vram`; nothing where there is neither."""
    from coterie import machine, memory
    from coterie import plan as planning
    from coterie.gpu.rates import delivered, products

    gpus = machine.gpus()
    if not gpus and vram is None:
        return
    gpu = planning.ASSUMED
    if gpus:
        with errors.status("measuring the GPU"):
            device = gpus[0].device
            gpu = planning.GpuRates(machine.gpu_bandwidth(device), delivered(device), products(device))
    available = memory.parse_bytes(vram) if vram else gpus[0].free
    usable = planning.usable(available)
    where = "as given" if vram else f"free on {escape(gpus[0].name)}"
    console.print(
        f"\n[bold]With a GPU[/]: {size(available)} of VRAM, {where}; {size(usable)} after a margin of 5%.",
        highlight=False,
    )
    report = table("", "experts in", "gpu_experts=", "VRAM needed", "", "RAM needed", "", "decode", "prefill")
    found = [p for every in formats for p in planning.placements(anatomy, every, usable, ram, rates, gpu)]
    for p in found:
        needed = size(p.vram), fits(p.vram_short), size(p.ram), fits(p.ram_short)
        report.add_row(p.format, str(p.gpu_experts), *needed, significant(p.decode), significant(p.prefill))
    console.print(report)
    for every in formats:
        best = planning.choose([p for p in found if p.format == every.name])
        if best is not None:
            asked = best.gpu_experts if isinstance(best.gpu_experts, int) else f'"{best.gpu_experts}"'
            console.print(f'{every.name}: [bold]device="cuda", gpu_experts={asked}[/]', highlight=False)
    rated = "measured here" if gpus else "assumed"
    work = planning.find_room(anatomy, formats[0], usable).work
    console.print(
        f"VRAM needed: all but the experts in bf16 ({size(anatomy.rest_nbytes)}), the KV cache of {anatomy.context} "
        f"tokens ({size(anatomy.cache_nbytes)}), {size(work)} to compute with, and "
        f"experts. Named is what is through first with a prompt of {planning.PROMPT} tokens and an answer of "
        f"{planning.ANSWER}. The GPU, {rated}: reads {size(gpu.memory)}/s, gets {size(gpu.delivered)}/s of packed "
        f"experts, {significant(gpu.products / 1e12)} TFLOP/s in bf16. Predictions; no model was timed for them.",
        style="dim",
        highlight=False,
    )


def print_verdict(source: Source, anatomy: Anatomy, kept: Dense | None = None) -> None:
    """Whether this version opens the model, and what it is. kept: linear layers that keep their codes."""
    if source.problem:
        console.print(f"[yellow]Not opened by this version:[/] {source.problem}.", highlight=False)
    elif source.packed:
        linears = f", linear layers in {source.dense_name}" if source.dense else ""
        console.print(
            f"[green]Opened as it is:[/] packed by coterie, experts in {source.packed.described}{linears}.",
            highlight=False,
        )
    elif source.quantised:
        said = "its experts keep their codes"
        if source.own:
            but = f" (but those of {source.odd}, packed anew)" if source.odd else ""
            said = f"its experts keep their codes{but} in {source.own.described}"
        said += f", {kept.count} linear layers theirs in {kept.described}" if kept else ""
        console.print(
            f"[green]Opened by this version:[/] quantised as {source.quantised.name}; {said}; the rest is dequantised.",
            highlight=False,
        )
        if source.choice:
            console.print(f"[yellow]experts=... is to be given:[/] {source.choice}.", highlight=False)
    else:
        console.print("[green]Opened by this version:[/] its experts are packed while it loads.", highlight=False)
    kinds = ", ".join(f"{k} of {e}" for e, k in sorted({(x.layout.num_experts, x.per_token) for x in anatomy.experts}))
    console.print(
        f"[bold]{anatomy.model_type}[/]: {count(anatomy.parameters)} parameters, {count(anatomy.active_parameters)} "
        f"read per token; {len(anatomy.experts)} layers with experts, {kinds} used per token.",
        highlight=False,
    )
    if source.stored:
        stored = ", ".join(f"{size(n)} of {dtype}" for dtype, n in sorted(source.stored.items()))
        console.print(f"On disk: {stored}.", highlight=False)


def print_sensible(anatomy: Anatomy, formats: ModelFormats) -> None:
    """Which format of linear layers makes sense beside experts in these formats, and why."""
    from coterie import plan as planning

    found = planning.sensible(anatomy, formats)
    read = anatomy.experts_read_nbytes(formats) + anatomy.rest_read_nbytes + anatomy.cache_nbytes
    if found is None:
        beside = f"beside {formats.name} experts: --dense saves little."
        console.print(f"Linear layers are a small part of what a token reads {beside}", highlight=False)
        return
    ram = f"{size(found.saved)} less RAM" if found.saved >= 0 else f"{size(-found.saved)} more RAM (the head is a copy)"
    console.print(
        f"Sensible on a CPU: [bold]--dense {planning.SENSIBLE}[/] (from_pretrained: dense={planning.SENSIBLE!r}). "
        f"Beside {formats.name} experts a token then reads {size(read - found.read_saved)} instead of {size(read)}; "
        f"{ram}.",
        highlight=False,
    )


def print_conversion(
    source: Source,
    anatomy: Anatomy,
    formats: list[ModelFormats],
    packing: dict[str, float],
    disk: float,
    linears: Dense | None,
) -> None:
    """What converting takes of disk and, roughly, of time."""
    from coterie import plan as planning

    console.print("\n[bold]coterie convert cpu[/]" + (", of a copy in bf16" if source.problem else ""))
    report = table("", "experts in", "reads", "writes", "about")
    stored = None if source.problem else sum(source.stored.values()) or None
    for every in formats:
        c = planning.conversion(anatomy, every, packing[every.name], disk, linears, stored)
        report.add_row(every.name, size(c.read), size(c.written), duration(c.seconds))
    console.print(report)
    console.print(
        f"An estimate: packing as fast as measured here, reading and writing {size(disk)}/s (--disk).",
        style="dim",
        highlight=False,
    )


def print_training(
    source: Source,
    anatomy: Anatomy,
    formats: list[ModelFormats],
    ram: int,
    linears: Dense | None,
    rank: int,
    batch: int,
    tokens: int,
) -> None:
    """What fine-tuning takes of memory."""
    from coterie import plan as planning

    with errors.status("running the model without storage"):
        train = planning.train_inspect(source.config, anatomy, rank, batch, tokens)
    title = f"LoRA of rank {rank} on attention and experts, {batch} x {tokens} tokens"
    console.print(f"\n[bold]coterie sft[/]: {title}", highlight=False)
    report = table("", "experts in", "weights", "RAM needed", "", "with checkpointing")
    for every in formats:
        t = planning.train_estimate(anatomy, train, every, ram, linears)
        report.add_row(t.format, size(t.weights), size(t.ram), fits(t.ram_short), size(t.ram_checkpointed))
    console.print(report)
    console.print(
        f"RAM needed: weights, LoRA {size(train.lora)}, its gradients as much, AdamW twice that, activations "
        f"{size(train.activations)} ({size(train.checkpointed)} with gradient_checkpointing), workspace "
        f"{size(train.workspace)}, {size(planning.RESERVE)} for Python and libraries.",
        style="dim",
        highlight=False,
    )


def fits(short: int) -> str:
    return f"[red]{size(short)} short[/]" if short else "[green]fits[/]"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{significant(round(seconds / length, 1))} {unit}"
    return f"{max(1, round(seconds))} s"
