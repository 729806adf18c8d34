"""`slotmemory bench`: what memories cost at the same budgets, one race per budget, each kept as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from slotmemory.errors import InputError, shorten

if TYPE_CHECKING:
    from slotmemory.bench import Folder, Row
    from slotmemory.engine import Engine

QUIET_SECONDS = 30.0  # between plain lines of progress
PROMPTS = (
    "The meadow is empty.",
    "A red cat walks in the meadow.",
    "A blue robot waits on the beach.",
    "A red cat jumps and a blue robot waits on the beach.",
    "The night is empty.",
    "A blue robot walks in the night.",
)


def bench(
    memories: str = typer.Option("all", help="Names or .py files, with commas; all: every one of the package."),
    budgets: str = typer.Option(
        "448,1344,2688,4680",
        help="Tokens that a layer may read from memory, with commas, a race for each; own: each memory's own size.",
    ),
    seconds: float = typer.Option(60.0, min=0.1, help="How long the videos are, of which start and end are timed."),
    chunks: int = typer.Option(6, min=1, max=1000, help="How many chunks are timed at the start, and at the end."),
    model: str = typer.Option("tiny", help="A name or a folder."),
    steps: str | None = typer.Option(None, help="1000,750,500,250 or 20, as in `generate`."),
    out: Path = typer.Option(
        Path("runs/bench"),
        metavar="FOLDER",
        help="Where bench.json, .csv and .png go after every race; races that are there already are not run again.",
    ),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1; default: a GPU where there is one."),
    dtype: str | None = typer.Option(None, help="fp32, bf16 or fp16; default: what the device is fast at."),
    compile: bool = typer.Option(False, "--compile", help="Compile the transformer's blocks."),
    kernel: str | None = typer.Option(None, help="Of attention: cudnn, flash, flash_attn, flash_attn_3, flex."),
    threads: int | None = typer.Option(None, min=1, help="Processor threads; default: one per core."),
) -> None:
    """Measure memories beside each other: tokens attended, bytes held, time to read, write and update, chunk time and
    its growth with the video's length. A bench that was stopped goes on with the same command; further budgets may
    follow into the same folder."""
    import torch
    from rich.console import Console

    from slotmemory import __version__
    from slotmemory.bench import Folder, Plan, table
    from slotmemory.bench.machine import hardware
    from slotmemory.cli.prepare import DTYPES, dtype_for, find_device
    from slotmemory.cli.signals import Stopped, held
    from slotmemory.cli.stream import lock
    from slotmemory.config import parse_steps
    from slotmemory.engine import Engine
    from slotmemory.memory import find, names
    from slotmemory.models import find as find_model
    from slotmemory.sampler import FewStep

    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {shorten(dtype)}: expected {', '.join(DTYPES)}")
    limits = parse_budgets(budgets)
    chosen = [name for word in memories.split(",") if word.strip() for name in _expand(word.strip(), names())]
    chosen = list(dict.fromkeys(chosen))
    if not chosen:
        raise InputError("--memories names none; give names with commas, or all")
    for name in chosen:
        find(name)  # an unknown one is refused before anything is loaded
    if threads is not None:
        torch.set_num_threads(threads)
    where = find_device(device)
    engine = Engine.from_pretrained(
        model,
        "none",
        steps=None if steps is None else parse_steps(steps),
        device=where,
        dtype=DTYPES[dtype or dtype_for(where)[0]],
        compile=compile,
        kernel=kernel,
    )
    sampler, end = engine.sampler, engine.layout.seconds(Plan.of(engine, limits, seconds, chunks).total)
    settings = {
        "model": model,
        "weights": find_model(model).fingerprint(),
        "seconds": end,
        "chunks": chunks,
        "steps": list(sampler.steps) if isinstance(sampler, FewStep) else sampler.count,
        "device": str(where),
        "hardware": hardware(where),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "compile": compile,
        "kernel": kernel,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "version": __version__,
        "tokens_per_frame": engine.layout.tokens_per_frame,
    }
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out):
        folder = Folder.open(out, settings, chosen)
        missing = [budget for budget in limits if folder.lacks(budget, chosen)]
        _tell_of_kept(folder, limits, missing)
        begun = time.monotonic()
        try:
            for done, budget in enumerate(missing):
                name = f"race {len(limits) - len(missing) + done + 1}/{len(limits)} at {_named(budget)}"
                left = partial(_left, begun, done, len(missing))
                rows = _race(engine, chosen, budget, seconds, chunks, name, left)
                with held():
                    folder.add(rows)
                if budget != missing[-1]:
                    console.print(table(rows, end))
        except Stopped as stopped:
            kept = sum(not folder.lacks(budget, chosen) for budget in limits)
            stopped.message = f"stopped; {kept} of {len(limits)} races are kept in {out}, the same command goes on"
            raise
        made = folder.write()
    console.print(table(folder.rows, end))
    for path in made:
        console.print(str(path), soft_wrap=True)


def _race(
    engine: Engine,
    names: Sequence[str],
    budget: int | None,
    seconds: float,
    timed: int,
    name: str,
    left: Callable[[float], str],
) -> list[Row]:
    """Run a race and tell on stderr how far it is. left: the time to the end, by the share of this race that is done."""
    from slotmemory.bench import Plan, cases, measure
    from slotmemory.cli.progress import Shown

    listed = cases(engine, names, [budget])
    plan = Plan.of(engine, [case.engine.memory.budget for case in listed if case.engine], seconds, timed)
    whole = plan.passes(engine, plan.total)

    def told(chunk: int) -> None:
        line = f"{name}: chunk {chunk}/{plan.total}, about {left(plan.passes(engine, chunk) / whole)} left"
        shown.tell(chunk, line, at_once=chunk == 1)

    with Shown(plan.total, 0, f"{name}: the first chunks are being made ...", QUIET_SECONDS) as shown:
        return measure(engine, listed, plan, PROMPTS, told)


def _left(begun: float, done: int, races: int, share: float) -> str:
    """What remains of `races`, of which `done` and a share of another took the time since `begun`."""
    from slotmemory.cli.progress import clock

    return clock((time.monotonic() - begun) * (races / (done + share) - 1))


def parse_budgets(text: str) -> list[int | None]:
    """Read `448,1344,own`: tokens, or None for a memory's own size."""
    found: list[int | None] = []
    for word in (part.strip() for part in text.split(",")):
        if not (word == "own" or word.isdecimal()):
            raise InputError(f"--budgets {shorten(text)}: expected tokens with commas, such as 448,1344, or own")
        found.append(None if word == "own" else int(word))
    return list(dict.fromkeys(found))


def _expand(word: str, known: list[str]) -> list[str]:
    return known if word == "all" else [word]


def _named(budget: int | None) -> str:
    return "own budgets" if budget is None else f"{budget} tokens"


def _tell_of_kept(folder: Folder, limits: Sequence[int | None], missing: Sequence[int | None]) -> None:
    """Say which races are not run, and which are run once more because memories have joined them."""
    kept = [_named(budget) for budget in limits if budget not in missing]
    again = [_named(budget) for budget in missing if folder.race(budget)]
    if kept:
        typer.echo(
            f"slotmemory: {folder.path} holds the races at {', '.join(kept)} already; they are not run again", err=True
        )
    if again:
        typer.echo(
            f"slotmemory: {folder.path} holds races at {', '.join(again)} without some of these memories; "
            "they are run again with all, and then replaced",
            err=True,
        )
