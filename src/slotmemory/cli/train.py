"""`slotmemory train`: run a training recipe, or go on with one."""

from __future__ import annotations

from pathlib import Path

import typer


def train(
    recipe: Path = typer.Argument(..., help="A YAML file such as recipes/train/tiny/codec.yaml."),
    out: Path | None = typer.Option(None, metavar="FOLDER", help="The run; default: runs/ and the recipe's name."),
    changes: list[str] = typer.Option([], "--set", metavar="KEY=VALUE", help="Change the recipe: optimizer.clip=0.5"),
    fresh: bool = typer.Option(False, "--fresh", help="Refuse a folder that holds a run, instead of going on with it."),
) -> None:
    """Train from a recipe; a folder that holds a checkpoint is gone on with."""
    import logging
    import sys

    from slotmemory.errors import InputError
    from slotmemory.training.loop import TrainingError
    from slotmemory.training.loop import train as run_training
    from slotmemory.training.recipe import load_recipe

    folder = out or default_folder(recipe)
    loaded = load_recipe(recipe, changes)
    if sys.stderr.isatty():
        from rich.logging import RichHandler

        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
    else:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        reason = run_training(loaded, folder, resume=not fresh)
    except TrainingError as error:
        raise InputError(str(error)) from error
    except FileExistsError as error:
        raise InputError(f"{folder} is a file, not a folder; choose another --out") from error
    if reason == "signal":
        typer.echo(f"slotmemory: stopped; the last step is kept in {folder}, the same command goes on", err=True)
        raise typer.Exit(130)
    typer.echo(f"weights    {folder / 'weights'}")


def default_folder(recipe: Path) -> Path:
    """runs/tiny-codec for recipes/train/tiny/codec.yaml."""
    parent = recipe.parent.name
    return Path("runs") / (f"{parent}-{recipe.stem}" if parent not in ("", "train", "recipes") else recipe.stem)
