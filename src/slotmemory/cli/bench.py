"""`slotmemory bench`: what memories cost at the same budgets, side by side in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from slotmemory.errors import InputError, shorten

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
        "448,1344,2688,4680", help="Tokens that a layer may read from memory, with commas; own: each memory's own size."
    ),
    seconds: float = typer.Option(60.0, min=0.1, help="How long the videos are, of which start and end are timed."),
    chunks: int = typer.Option(6, min=1, max=1000, help="How many chunks are timed at the start, and at the end."),
    model: str = typer.Option("tiny", help="A name or a folder."),
    steps: str | None = typer.Option(None, help="1000,750,500,250 or 20, as in `generate`."),
    out: Path = typer.Option(Path("runs/bench"), metavar="FOLDER", help="Where bench.json, .csv and .png go."),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1; default: a GPU where there is one."),
    dtype: str | None = typer.Option(None, help="fp32, bf16 or fp16; default: what the device is fast at."),
    compile: bool = typer.Option(False, "--compile", help="Compile the transformer's blocks."),
    kernel: str | None = typer.Option(None, help="Of attention: cudnn, flash, flash_attn, flash_attn_3, flex."),
    threads: int | None = typer.Option(None, min=1, help="Processor threads; default: one per core."),
) -> None:
    """Measure memories beside each other: tokens attended, bytes held, time to read, write and update, chunk time and
    its growth with the video's length."""
    import torch
    from rich.console import Console

    from slotmemory.bench import Plan, cases, measure, plot, table, write
    from slotmemory.cli.prepare import DTYPES, dtype_for, find_device
    from slotmemory.config import parse_steps
    from slotmemory.engine import Engine
    from slotmemory.memory import names

    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {shorten(dtype)}: expected {', '.join(DTYPES)}")
    limits = parse_budgets(budgets)
    chosen = [name for word in memories.split(",") if word.strip() for name in _expand(word.strip(), names())]
    if not chosen:
        raise InputError("--memories names none; give names with commas, or all")
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
    plan = Plan.of(engine, limits, seconds, chunks)
    listed = cases(engine, list(dict.fromkeys(chosen)), limits)
    with _Told(plan.total, sum(case.engine is not None for case in listed)) as told:
        rows = measure(engine, listed, plan, PROMPTS, told)

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=160)
    console.print(table(rows, plan.seconds(engine)))
    settings = {
        "model": model,
        "seconds": list(plan.seconds(engine)),
        "chunks": chunks,
        "device": str(where),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "compile": compile,
        "kernel": kernel,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "tokens_per_frame": engine.layout.tokens_per_frame,
    }
    made = write(rows, settings, out)
    plot(rows, out / "bench.png")
    for path in (*made, out / "bench.png"):
        console.print(str(path), soft_wrap=True)


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


class _Told:
    """A bar on a terminal's stderr while streams are made."""

    def __init__(self, chunks: int, streams: int):
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self.bar = Progress(console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task(f"{streams} streams of {chunks} chunks", total=chunks)

    def __enter__(self) -> _Told:
        self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.stop()

    def __call__(self, chunk: int) -> None:
        self.bar.update(self.task, completed=chunk)
