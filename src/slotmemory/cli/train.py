"""`slotmemory train`: run a training recipe, or go on with one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from slotmemory.training.journal import Watch
    from slotmemory.training.recipe import Recipe

GPU_TFLOPS = 400.0  # a large GPU in bf16; about 40 % of what an H100 promises


def train(
    recipe: Path = typer.Argument(..., help="A YAML file such as recipes/train/tiny/codec.yaml."),
    out: Path | None = typer.Option(None, metavar="FOLDER", help="The run; default: runs/ and the recipe's name."),
    changes: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Change the recipe: optimizer.clip=0.5"),
    fresh: bool = typer.Option(False, "--fresh", help="Refuse a folder that holds a run, instead of going on with it."),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Only say what is trained, and the memory and time it takes."
    ),
    tflops: float | None = typer.Option(
        None, min=0.001, help="For --dry-run: what a process sustains; default: 400 on a GPU, on a processor measured."
    ),
) -> None:
    """Train from a recipe; a folder that holds a checkpoint is gone on with."""
    import logging
    import sys

    from slotmemory.config import launched
    from slotmemory.errors import InputError
    from slotmemory.training.loop import TrainingError
    from slotmemory.training.loop import train as run_training
    from slotmemory.training.processes import Place
    from slotmemory.training.recipe import load_recipe

    folder = out or default_folder(recipe)
    place = None if launched() is None else Place(*launched())
    if place is not None:  # as many as were started, whatever the recipe says
        changes = [*changes, f"processes={place.world}"]
    loaded = load_recipe(recipe, changes)
    if place is not None and place.rank:  # process 0 speaks for all
        try:
            if not dry_run:
                run_training(loaded, folder, resume=not fresh, place=place)
        except TrainingError:
            raise typer.Exit(1) from None
        return
    if dry_run:
        from slotmemory.training.plan import plan, told

        planned = plan(loaded)
        for line in told(planned, *_rate(loaded, tflops)):
            typer.echo(line)
        return
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        with progress(loaded.steps) as watch:
            reason = run_training(loaded, folder, resume=not fresh, watch=watch, place=place)
    except TrainingError as error:
        raise InputError(str(error)) from error
    except FileExistsError as error:
        raise InputError(f"{folder} is a file, not a folder; choose another --out") from error
    if reason == "signal":
        typer.echo(f"slotmemory: stopped; the last step is kept in {folder}, the same command goes on", err=True)
        raise typer.Exit(130)
    typer.echo(f"weights    {folder / 'weights'}")


def _rate(recipe: Recipe, given: float | None) -> tuple[float, str]:
    """TFLOP/s of a process, and what they are: as given, a GPU's, or what this processor reaches as the recipe uses it."""
    import torch

    from slotmemory.bench.machine import matrix_rate
    from slotmemory.training.objective import DTYPES

    device = torch.device(recipe.device)
    if given is not None or device.type != "cpu":
        return given or GPU_TFLOPS, "sustained"
    before = torch.get_num_threads()
    torch.set_num_threads(recipe.threads)
    try:
        rate = matrix_rate(device, DTYPES[recipe.precision], repeats=3)
    finally:
        torch.set_num_threads(before)
    threads = "1 thread" if recipe.threads == 1 else f"{recipe.threads} threads"
    return rate / 1e12, f"of a matrix product here and now ({recipe.precision}, {threads})"


@contextmanager
def progress(steps: int) -> Iterator[Watch | None]:
    """A bar with the losses, the pace and the time left; None where there is no terminal to draw it on."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn
    from rich.table import Column

    from slotmemory.training.journal import UNSAID, duration

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    line = Column(no_wrap=True, overflow="ellipsis")
    columns = (BarColumn(bar_width=20), TextColumn("{task.description}", table_column=line))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("the first step is being taken ...", total=steps)
        losses: dict[str, float] = {}

        def watch(record: Mapping[str, float]) -> None:
            losses.update({name: value for name, value in record.items() if name not in UNSAID})
            told = " ".join(f"{name} {value:.3g}" for name, value in losses.items())
            pace, left = record["steps_per_second"], duration(record["seconds_left"])
            text = f"{record['step']}/{steps}  {pace:.2f} steps/s, {left} left  [dim]{told}"
            bar.update(task, completed=record["step"], description=text)

        yield watch


def default_folder(recipe: Path) -> Path:
    """runs/tiny-codec for recipes/train/tiny/codec.yaml."""
    parent = recipe.parent.name
    return Path("runs") / (f"{parent}-{recipe.stem}" if parent not in ("", "train", "recipes") else recipe.stem)
