"""The commands of `slotmemory`, and how their complaints reach people: one line, one exit status.

A command imports what it needs when it runs, so that `slotmemory --help` answers at once.
"""

from __future__ import annotations

import sys
import traceback

import typer

from slotmemory.cli import bench, convert, doctor, generate, memories, train
from slotmemory.errors import InputError, shorten

UsageError = typer.BadParameter.__base__  # typer carries its own copy of click in some releases, click itself in others
ClickException = UsageError.__base__

app = typer.Typer(
    name="slotmemory",
    help="Stream long videos that remember: a script of prompts in, a video out, chunk by chunk.",
    epilog="Start with: slotmemory generate examples/lost-and-found.yaml",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate", cls=generate.WithMemoryArguments)(generate.generate)
app.command("resume")(generate.resume)
app.add_typer(memories.app, name="memories")
app.command("bench")(bench.bench)
app.command("train")(train.train)
app.command("convert")(convert.convert)
app.command("doctor")(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        from slotmemory import __version__

        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _everywhere(
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an unexpected error."),
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def run(words: list[str]) -> int:
    """Run one command; return its exit status."""
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]  # wherever it stands
    try:
        status = app(words or ["--help"], prog_name="slotmemory", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except InputError as error:
        if debug:
            traceback.print_exc()
        return _complain(str(error), 2)
    except ClickException as error:
        context = getattr(error, "ctx", None)
        advice = f"; see `{context.command_path} --help`" if context else ""
        return _complain(error.format_message().rstrip(".") + advice, 2)
    except OSError as error:
        if debug:
            traceback.print_exc()
        return _complain(str(InputError.from_os("use", error.filename or "a file", error)), 2)
    except Exception as error:  # noqa: BLE001 - the last place that can tell people what happened
        if debug:
            traceback.print_exc()
            return 1
        said = f"{type(error).__name__}: {shorten(' '.join(str(error).split()), 300)}"
        return _complain(f"unexpected {said}; run it again with --debug and report the traceback as an issue", 1)


def _complain(line: str, status: int) -> int:
    print(f"slotmemory: {' '.join(line.split())}", file=sys.stderr, flush=True)
    return status
