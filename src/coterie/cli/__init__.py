"""The `coterie` command. One file per command; this one names them and turns errors into one line and exit code 2."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from coterie.cli import adapter, bench, chat, convert, doctor, plan, quickstart, serve, sft
from coterie.cli.console import errors
from coterie.errors import CoterieError

app = typer.Typer(
    name="coterie",
    help="Run Mixture-of-Experts models larger than your GPU: the experts live packed in RAM and are computed there.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("quickstart")(quickstart.quickstart)
app.command("doctor")(doctor.doctor)
app.command("plan")(plan.plan)
app.command("sft")(sft.sft)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.add_typer(convert.app, name="convert")
app.add_typer(adapter.app, name="adapter")
app.add_typer(bench.app, name="bench")


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(f"coterie {version('coterie')}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point: runs a command; a CoterieError becomes one line on stderr and exit code 2."""
    # PEFT and TRL set options of Transformers by names that it has since changed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        app()
    except CoterieError as error:
        errors.print(f"coterie: {' '.join(str(error).split())}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
