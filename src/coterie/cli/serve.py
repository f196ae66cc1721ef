"""coterie serve: a model over HTTP, for clients of OpenAI's API."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.adapter import need_peft
from coterie.cli.console import console, errors
from coterie.cli.in_use import where_it_is
from coterie.cli.model_options import Dense, Device, Experts, GpuContext, GpuExperts, Mmap, Model, read_gpu_experts
from coterie.errors import ArgumentError

LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Model,
    name: Annotated[str | None, typer.Option(help="What clients call the model. [default: MODEL]")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", "-a", help="NAME=FOLDER of a PEFT LoRA adapter, served as the model NAME; repeat."),
    ] = None,
    experts: Experts = None,
    dense: Dense = "auto",
    device: Device = "cpu",
    gpu_experts: GpuExperts = None,
    gpu_context: GpuContext = 8192,
    mmap: Mmap = False,
    batch_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Answer requests together, with a cache for so many tokens of prompts and answers."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 is all of this machine's.")] = LOCAL[0],
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen at.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="COTERIE_API_KEY", help="What clients must send as their API key.")
    ] = None,
) -> None:
    """Serve a model over HTTP: /v1/chat/completions, completions, responses and models, and /health.

    The server is Transformers' own. It answers one request after the other, or together (--batch-tokens), without
    adapters, stop and seed. Ctrl-C lets running answers end.
    """
    try:
        import fastapi  # noqa: F401
        import openai  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ArgumentError(f"serving needs {error.name}: pip install 'coterie[serve]'") from None
    name = name or model
    adapters = parse_adapters(adapter or [], name)
    if adapters and batch_tokens:
        raise ArgumentError("requests to several adapters are not answered together: leave out --batch-tokens")
    if adapters:
        need_peft()
    with errors.status("importing torch and transformers"):
        from transformers import __version__, logging

        from coterie.serve.opening import context_length, open_model

        try:
            from coterie.serve.server import Server, bind, run
        except ImportError as error:
            found = f"expected the server of Transformers 5.24, found Transformers {__version__}"
            raise ArgumentError(f"{found} ({error}): pip install 'transformers==5.24.*'") from None

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    placed = {"device": device, "gpu_experts": read_gpu_experts(gpu_experts, device)}
    placed["gpu_context"] = max(gpu_context, batch_tokens or 0)
    with bind(host, port) as bound:
        with errors.status(f"loading {model}"):
            opened, tokenizers = open_model(model, adapters, experts=experts, dense=dense, mmap=mmap, **placed)
        server = Server(name, opened, tokenizers, context_length(opened), batch_tokens)
        line = f"{', '.join([name, *adapters])} at http://{host}:{port}/v1"
        for each in filter(None, (where_it_is(opened), line)):
            console.print(each, markup=False, highlight=False, soft_wrap=True)
        if host not in LOCAL and not api_key:
            errors.print("Whoever reaches this address can use it: --api-key asks for a key.", style="yellow")
        run(server, bound, api_key)


def parse_adapters(given: list[str], model: str) -> dict[str, Path]:
    """{name: folder} of "name=folder" each. Raises ArgumentError."""
    found: dict[str, Path] = {}
    for text in given:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ArgumentError(f"--adapter: expected NAME=FOLDER, found {text!r}")
        if name in found or name == model:
            raise ArgumentError(f"--adapter: {name!r} is served already: choose another name")
        found[name] = Path(folder)
    return found
