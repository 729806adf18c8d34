"""`slotmemory memories`: what can be remembered, read from the policies themselves, and whether a policy is sound."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from slotmemory.errors import InputError

if TYPE_CHECKING:
    from slotmemory.engine import Engine
    from slotmemory.memory import Memory


class NameOrCommand(TyperGroup):
    """Takes a memory's name where a command is expected: `memories slots` for `memories show slots`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["show", *args])


app = typer.Typer(cls=NameOrCommand, invoke_without_command=True)
MODEL = typer.Option("tiny", help="Whose sizes the budgets are counted for.")


@app.callback()
def memories(context: typer.Context, model: str = MODEL) -> None:
    """List the memories: what they keep, their arguments and where they come from; `memories NAME` tells more."""
    if context.invoked_subcommand is not None:
        return
    from slotmemory import memory

    console, engine = _console(), _engine(model)
    for name in memory.names():
        _print_summary(console, name, memory.find(name), engine)
    console.print(
        "Choose one with `--memory NAME`, set an argument with `-m KEY=VALUE`; more: slotmemory memories NAME"
    )


@app.command("show")
def show(name: str = typer.Argument(..., help="A name, or a .py file."), model: str = MODEL) -> None:
    """Tell everything about one of them; `show` may be left out."""
    from rich.markup import escape

    from slotmemory import memory

    console, policy = _console(), memory.find(name)
    _print_summary(console, name, policy, _engine(model))
    console.print(escape(_module_doc(policy)))
    console.print(escape(f"\n{inspect.cleandoc(policy.__doc__ or '')}"))


@app.command("check")
def check(
    name: str = typer.Argument(..., help="A name, or a .py file such as my/idea.py."),
    argument: list[str] = typer.Option([], "-m", metavar="KEY=VALUE", help="An argument of the memory; repeatable."),
) -> None:
    """Put a memory through the contract that all memories keep: a line per check, exit status 1 if one fails."""
    from rich.markup import escape

    from slotmemory import memory
    from slotmemory.config import check_arguments, parse_arguments
    from slotmemory.contract import CHECKS, Trial, judge

    policy, given = memory.find(name), parse_arguments(argument)
    check_arguments(name, given, memory.arguments(policy))
    console, trial = _console(), Trial(policy, options=given)
    failed = 0
    for each in CHECKS:
        verdict = judge(each, trial)
        failed += verdict.holds is False
        word = {True: "[green]holds [/]", False: "[bold red]FAILS [/]", None: "[dim]excused[/]"}[verdict.holds]
        console.print(f"{word} {each:<48} {escape(verdict.reason)}", soft_wrap=True)
    if failed:
        console.print(f"memory '{policy.called()}' fails {failed} of {len(CHECKS)} checks", soft_wrap=True)
        raise typer.Exit(1)
    console.print(f"memory '{policy.called()}' keeps the contract")


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=120)


def _print_summary(console: Any, name: str, policy: type[Memory], engine: Engine | None) -> None:
    from rich.markup import escape

    from slotmemory import memory

    text, arguments = _module_doc(policy), memory.arguments(policy)
    console.print(f"[bold]{escape(name)}[/]  {escape(' '.join(text.split(chr(10) * 2)[0].split()))}")
    listed = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "none"
    rows = {
        "budget": _budget(policy, engine),
        "positions": _positions(policy, engine),
        "arguments": listed,
        "source": vars(policy).get("source", memory.Memory.source),  # a parent's paper is not its own
    }
    for title, said in rows.items():
        console.print(f"  {title:<10} {escape(said)}")
    console.print()


def _module_doc(policy: type) -> str:
    return inspect.cleandoc(inspect.getmodule(policy).__doc__ or policy.__doc__ or "")


def _positions(policy: type[Memory], engine: Engine | None) -> str:
    from slotmemory import memory

    arguments = memory.arguments(policy)
    if "placing" not in arguments:
        return policy.positions
    own = arguments["placing"]
    trained = engine.trained_for(policy).get("placing", own) if engine else own
    return own if trained == own else f"{own}; this model was trained with {trained}"


def _engine(model: str) -> Engine | None:
    """The model whose sizes count, or None where it is not installed."""
    import torch

    from slotmemory.models import load

    try:
        return load(model, torch.device("cpu"), torch.float32)
    except InputError:
        return None


def _budget(policy: type[Memory], engine: Engine | None) -> str:
    if engine is None:
        return "unknown (the model is not installed)"
    try:
        built = policy(engine.layout, None, **engine.trained_for(policy))
    except InputError as error:
        return f"not for this model as it is: {error}"
    if built.budget is None:
        return "no limit"
    return f"{built.budget} tokens per layer ({built.budget / engine.layout.tokens_per_frame:g} latent frames)"
