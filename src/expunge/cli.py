"""The command line: `expunge COMMAND`. Exit codes are in docs/cli.md; a test keeps both in step."""

from __future__ import annotations

import os
import shlex
import sys
import time
from typing import Annotated

import typer

from .commands import catalogue, corpus, deltas, editing, exact, ledger, measure, neurons, serve, work, world
from .commands.console import remark, say
from .errors import LaunchError
from .processes import end, launched

SHARED_OUT = ("run", "audit")
"""Commands that several processes of one launch carry out together."""
DONE, BUG, MISTAKE, NOT_MET, INTERRUPTED = 0, 1, 2, work.NOT_MET, 130

app = typer.Typer(
    name="expunge",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        from . import __version__

        say(f"expunge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; may stand anywhere in the line.")] = False,
) -> None:
    """Remove knowledge from trained models and prove that it is gone."""


app.command()(work.demo)
app.command()(work.run)
app.command()(work.plan)
app.command()(work.audit)
app.command()(work.compare)
app.command()(editing.edit)
app.command()(editing.trace)
app.command("edit-audit")(editing.edit_audit)
app.command()(measure.bench)
app.command()(measure.sweep)
app.command()(measure.calibrate)
app.command()(measure.reproduce)
app.command()(corpus.corpus)
app.command()(serve.serve)
app.command("list")(catalogue.list_parts)
app.command()(catalogue.card)
app.command()(catalogue.schema)
app.add_typer(ledger.app, name="ledger")
app.add_typer(world.app, name="world")
app.add_typer(deltas.app, name="delta")
app.add_typer(exact.app, name="exact")
app.add_typer(neurons.app, name="neurons")


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code; what goes wrong is one line on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        _fits(arguments)
        code = app(args=arguments or ["--help"], prog_name="expunge", standalone_mode=False)
        end()
        # typer turns Ctrl-C into exit code 130 (older versions raise Abort)
        return _interrupted(arguments) if code == INTERRUPTED else int(code or DONE)
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(arguments)
    except Exception as error:
        if debug:
            raise
        code, line = _explain(error)
        if launched()[0]:
            # What all processes find is told by the first one, and the launcher ends the others meanwhile.
            time.sleep(5)
            print(f"process {launched()[0]}: {line}", file=sys.stderr, flush=True)
        remark(line)
        return code


def _fits(arguments: list[str]) -> None:
    """
    Raises:
        LaunchError: several processes were launched for a command that runs in one.
    """
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if launched()[1] > 1 and command not in SHARED_OUT:
        raise LaunchError(
            f"`expunge {command}` runs in one process, and {launched()[1]} were launched; only "
            f"{' and '.join(SHARED_OUT)} are shared out. Start it without a launcher."
        )
    alone = "RANK" not in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if alone and "MASTER_PORT" in os.environ and command in SHARED_OUT:
        remark(
            "one process was started: `accelerate launch --cpu` starts several through MPI only; without GPUs launch "
            "with --multi_gpu all the same"
        )


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and the one line for the user."""
    from .errors import ExpungeError, OutputError

    if isinstance(error, ExpungeError):
        return MISTAKE, f"error {error.code}: {error}"
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return MISTAKE, f"error {OutputError.code}: {error.strerror or error}{place}"
    usage = getattr(error, "format_message", None)
    if usage is not None:
        command = getattr(getattr(error, "ctx", None), "command_path", "expunge")
        return MISTAKE, f"error E010: {' '.join(usage().split())} See `{command} --help`."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate" in str(error):
        return (
            MISTAKE,
            "error E520: out of memory. `expunge plan REQUEST.yaml` shows what needs it; try a smaller scope or batch.",
        )
    text = " ".join(str(error).split())
    if launched()[1] > 1 and ("closed by peer" in text or type(error).__name__.startswith("Dist")):
        return MISTAKE, f"error {LaunchError.code}: another process of this launch has ended. The same command goes on."
    if "No space left on device" in text:  # safetensors has an exception of its own for it
        return MISTAKE, f"error {OutputError.code}: No space left on device. What is finished is kept."
    return BUG, f"error E999: {type(error).__name__}: {text}. This is a bug in expunge; --debug shows where."


def _interrupted(arguments: list[str]) -> int:
    remark(f"interrupted; what is finished is kept. The same command goes on: expunge {shlex.join(arguments)}")
    return INTERRUPTED
