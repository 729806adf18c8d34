"""`slotmemory memories`: what can be remembered, read from the policies themselves."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING

import typer

from slotmemory.errors import InputError

if TYPE_CHECKING:
    from slotmemory.engine import Engine

SOURCE = re.compile(r"(?:^|\n)Sources?: (.*?)(?:\n\n|$)", re.DOTALL)
ARXIV = re.compile(r"arXiv \d{4}\.\d{4,5}")


def memories(
    name: str | None = typer.Argument(None, help="Tell everything about one of them; a .py file works too."),
    model: str = typer.Option("tiny", help="Whose sizes the budgets are counted for."),
) -> None:
    """List the memories: what they keep, their arguments and where they come from."""
    from rich.console import Console
    from rich.markup import escape

    from slotmemory import memory

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    engine = _engine(model)
    for each in [name] if name else memory.names():
        policy = memory.find(each)
        text = _module_doc(policy)
        console.print(f"[bold]{escape(each)}[/]  {escape(' '.join(text.split(chr(10) * 2)[0].split()))}")
        arguments = memory.arguments(policy)
        listed = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "none"
        console.print(f"  budget     {escape(_budget(policy, engine))}")
        console.print(f"  arguments  {escape(listed)}")
        console.print(f"  source     {escape(_source(text))}\n")
        if name:
            console.print(escape(text))
            console.print(escape(f"\n{policy.__doc__ or ''}"))
    if not name:
        console.print(
            "Choose one with `--memory NAME`, set an argument with `-m KEY=VALUE`; more: slotmemory memories NAME"
        )


def _module_doc(policy: type) -> str:
    return inspect.cleandoc(inspect.getmodule(policy).__doc__ or policy.__doc__ or "")


def _source(text: str) -> str:
    found = SOURCE.search(text)
    if found:
        return " ".join(found.group(1).split())
    papers = ARXIV.search(text)
    return papers.group(0) if papers else "this project"


def _engine(model: str) -> Engine | None:
    """The model whose sizes count, or None where it is not installed."""
    import torch

    from slotmemory.models import load

    try:
        return load(model, torch.device("cpu"), torch.float32)
    except InputError:
        return None


def _budget(policy: type, engine: Engine | None) -> str:
    if engine is None:
        return "unknown (the model is not installed)"
    from slotmemory import memory

    known = memory.arguments(policy)
    try:
        built = policy(engine.layout, None, **{k: v for k, v in engine.memory_defaults.items() if k in known})
    except InputError as error:
        return f"not for this model as it is: {error}"
    if built.budget is None:
        return "0 tokens per layer" if built.called() == "none" else "no limit"
    return f"{built.budget} tokens per layer ({built.budget / engine.layout.tokens_per_frame:g} latent frames)"
