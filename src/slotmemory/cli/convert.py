"""`slotmemory convert`: any published checkpoint into a folder that loads at once, with adapters merged or beside it."""

from __future__ import annotations

from pathlib import Path

import typer

from slotmemory.errors import InputError, shorten


def convert(
    model: str = typer.Argument(help="A preset, folder, file of weights, or org/name of the Hub."),
    out: Path = typer.Option(..., help="A new folder, or a .safetensors file for the transformer alone."),
    lora: list[str] = typer.Option(
        [], metavar="FILE[=SCALE]", help="An adapter to add, as lora.safetensors=0.8; repeatable."
    ),
    keep_lora: bool = typer.Option(False, "--keep-lora", help="Keep adapters switchable instead of merging them."),
    part: str | None = typer.Option(None, help="Which network of a trainer's file: generator, generator_ema."),
    dtype: str = typer.Option("bf16", help="Of the transformer: bf16, fp16, fp32, or same as it is stored."),
) -> None:
    """Write a model of any layout as a folder of safetensors, which `generate --model FOLDER` takes."""
    from dataclasses import replace

    from slotmemory.checkpoints.convert import convert as write
    from slotmemory.cli.prepare import DTYPES
    from slotmemory.errors import unknown
    from slotmemory.models import find

    if dtype != "same" and dtype not in DTYPES:
        raise InputError(unknown("dtype", dtype, [*DTYPES, "same"]))
    sources = find(model)
    added = [_adapter(text) for text in lora]
    sources = replace(
        sources,
        part=part or sources.part,
        loras=tuple(replace(adapter, merge=adapter.merge and not keep_lora) for adapter in (*sources.loras, *added)),
    )
    write(sources, out, DTYPES.get(dtype), typer.echo)
    where = f"slotmemory generate story.yaml --model {out}"
    typer.echo(f"{model} is now in {out}; use it with: {where}")


def _adapter(text: str):
    from slotmemory.checkpoints.sources import adapter

    file, equals, scale = text.partition("=")
    try:
        strength = float(scale) if equals else 1.0
    except ValueError:
        raise InputError(f"--lora {shorten(text)}: the scale is no number; write FILE=0.8") from None
    return adapter(file, strength)
