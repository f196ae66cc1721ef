"""coterie chat: talk to a model on the terminal."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coterie.cli.adapter import need_peft
from coterie.cli.console import console, errors, significant
from coterie.cli.in_use import memory_in_use, where_it_is
from coterie.cli.model_options import Dense, Device, Experts, GpuContext, GpuExperts, Mmap, Model, read_gpu_experts
from coterie.errors import ArgumentError

if TYPE_CHECKING:
    from coterie.serve.conversation import Answer, Conversation

CONTROL = dict.fromkeys(code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t")
ENDED = {"stop": "", "length": ", stopped at the most tokens", "interrupted": ", interrupted"}
COMMANDS = "/new forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer."


def chat(
    model: Model,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", "-a", help="Folder of a PEFT LoRA adapter to talk through.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", "-s", help="The system prompt.")] = None,
    experts: Experts = None,
    dense: Dense = "auto",
    device: Device = "cpu",
    gpu_experts: GpuExperts = None,
    gpu_context: GpuContext = 8192,
    mmap: Mmap = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 2048,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="0 always takes the likeliest token. [default: the model's]")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from this share of the probability.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from so many tokens.")] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Sample from tokens this likely beside the likeliest.")
    ] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0.01, help="Above 1: repeat less.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeat itself.")] = None,
) -> None:
    """Talk to a model: its answers are streamed, with their speed and the memory in use after each.

    Without a chat template a model continues text, line by line. Sampling options that are left out are the model's.
    """
    if adapter is not None:
        need_peft()
    with errors.status("importing torch and transformers"):
        import torch
        from transformers import logging

        from coterie.serve.conversation import Conversation
        from coterie.serve.opening import open_model
        from coterie.serve.sampling import settings

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name = None if adapter is None else "default"
    adapters = {} if adapter is None else {"default": adapter}
    placed = {"device": device, "gpu_experts": read_gpu_experts(gpu_experts, device), "gpu_context": gpu_context}
    with errors.status(f"loading {model}"):
        opened, tokenizers = open_model(model, adapters, experts=experts, dense=dense, mmap=mmap, **placed)
    if line := where_it_is(opened):
        note(line)
    chosen = settings(
        opened.generation_config,
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    if seed is not None:
        torch.manual_seed(seed)
    talk(Conversation(opened, tokenizers[name], chosen, system))


def talk(conversation: Conversation) -> None:
    """Reads lines and prints answers until the input ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  (lets input() edit lines and remember them)
    if not conversation.has_template:
        note("This model has no chat template: it continues each line you type as text, and remembers none.")
    note(COMMANDS)
    while True:
        try:
            said = input("> ")
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print()
            note(COMMANDS)
            continue
        command = said.strip()
        if command == "/exit":
            return
        if command == "/new":
            conversation.restart()
            note("The conversation is forgotten.")
        elif command.startswith("/") and " " not in command and command.count("/") == 1:
            note(COMMANDS)
        elif command:
            try:
                answer = conversation.ask(said, show)
            except ArgumentError as error:
                errors.print(f"{error} (/new)", markup=False, highlight=False, soft_wrap=True)
                continue
            console.print()
            note(f"[{report(answer)}]")


def show(piece: str, thought: bool) -> None:
    """Prints a piece of an answer, dimmed where it is thought; control characters are left out."""
    console.out(piece.translate(CONTROL), end="", style="dim" if thought else None, highlight=False)
    console.file.flush()


def report(answer: Answer) -> str:
    """What an answer took: "31 tokens, 12.3 tokens/s; prompt of 25 tokens in 0.42 s; 1.2 GB of RAM"."""
    speed = f", {significant((answer.tokens - 1) / answer.seconds)} tokens/s" if answer.tokens > 1 else ""
    known = answer.prompt_tokens - answer.computed_tokens
    prompt = f"prompt of {answer.prompt_tokens} tokens" + (f", {known} of them known," if known else "")
    parts = (
        f"{answer.tokens} tokens{speed}{ENDED[answer.ended]}",
        f"{prompt} in {significant(answer.prompt_seconds)} s",
        memory_in_use(),
    )
    return "; ".join(parts)


def note(line: str) -> None:
    console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)
