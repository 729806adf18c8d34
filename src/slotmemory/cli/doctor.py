"""`slotmemory doctor`: what this machine offers, which parts are in place, and whether a job would fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    import torch

    from slotmemory.cli.fit import Forecast
    from slotmemory.config import Generate

OPTIONAL = ("diffusers", "transformers", "huggingface_hub", "ftfy", "torchao", "flash_attn")


def doctor(
    script: Path | None = typer.Argument(None, help="A script: also say what it would take."),
    model: str = typer.Option("tiny", help="A preset, folder, file of weights, or org/name of the Hub."),
    memory: str = typer.Option("slots", help="The memory that the forecast is for."),
    argument: list[str] = typer.Option([], "-m", metavar="KEY=VALUE", help="An argument of the memory; repeatable."),
    budget: int | None = typer.Option(None, help="Tokens that a layer may read from memory."),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1; default: a GPU where there is one."),
    dtype: str | None = typer.Option(None, help="fp32, bf16 or fp16; default: what the device is fast at."),
    quant: str | None = typer.Option(None, help="int8 or fp8: eight-bit weights in the transformer's blocks."),
    offload: str | None = typer.Option(None, help="text, codec or all: what rests on the processor beside a GPU."),
    kernel: str | None = typer.Option(None, help="Also try this attention kernel: flash_attn, flash_attn_3, flex ..."),
) -> None:
    """Print versions, device, attention kernels, free memory and the state of a model; with a script, what it takes."""
    from slotmemory.config import generate_options, parse_arguments
    from slotmemory.errors import InputError

    values = {"model": model, "memory": memory, "budget": budget, "device": device, "dtype": dtype}
    values |= {"quant": quant, "offload": offload, "kernel": kernel}
    given = {name: value for name, value in values.items() if value is not None}
    options = generate_options({**given, "arguments": parse_arguments(argument)})
    for name, value in _machine(options):
        _row(name, value)
    try:
        for name, value in _model(options, script):
            _row(name, value)
    except InputError as error:
        _row("model", f"{model}: not usable")
        raise InputError(f"model '{model}': {error}") from error


def _row(name: str, value: str) -> None:
    typer.echo(f"{name:<12}{value}")


def _machine(options: Generate) -> list[tuple[str, str]]:
    import platform
    import shutil
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from slotmemory import __version__
    from slotmemory.backbones import kernels
    from slotmemory.cli.dry_run import size
    from slotmemory.cli.fit import free_bytes
    from slotmemory.cli.prepare import DTYPES, dtype_for, find_device
    from slotmemory.run import git_commit

    def installed(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} not installed"

    device = find_device(options.device)
    chosen, reason = (options.dtype, "asked for") if options.dtype else dtype_for(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    free = {"processor": free_bytes(torch.device("cpu"))}
    if device.type != "cpu":
        free = {str(device): free_bytes(device), **free}
    said = ", ".join(f"{size(count)} on the {where}" for where, count in free.items() if count is not None)
    return [
        ("slotmemory", f"{__version__}, commit {git_commit() or 'unknown'}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("optional", ", ".join(map(installed, OPTIONAL))),
        ("device", f"{device} ({name})"),
        ("dtype", f"{chosen}: {reason}"),
        ("threads", str(torch.get_num_threads())),
        ("kernels", "; ".join(map(str, kernels.check(device, DTYPES[chosen], 128)))),
        ("", f"in use: {kernels.use(options.kernel, device, DTYPES[chosen], 128)}"),
        ("free memory", said or "the system does not tell"),
        ("free disk", f"{size(shutil.disk_usage('.').free)} here"),
    ]


def _model(options: Generate, path: Path | None) -> list[tuple[str, str]]:
    """The model's state, and the forecast for a script."""
    from slotmemory.cli.dry_run import size
    from slotmemory.cli.prepare import DTYPES, dtype_for, find_device, on_shapes, plan
    from slotmemory.script import load_script

    dtype = DTYPES[options.dtype or dtype_for(find_device(options.device))[0]]
    sources, missing, _ = on_shapes(options.model, dtype, options.quant, fetch=False)
    if sources is None:
        fetched = ", ".join(map(str, missing))
        rows = [("model", f"{options.model}: not on this machine yet; its first use fetches {fetched}")]
    else:
        total = sum(file.stat().st_size for file in sources.files())
        place, checksum = sources.transformer.parent, sources.fingerprint()
        rows = [("model", f"{options.model}: {place}, {size(total)}, checksum {checksum}")]
    if path is not None:
        script = load_script(path)
        rows += _forecast(plan(script, options, fetch=False), script.title or path.name)
    return rows


def _forecast(planned: Any, title: str) -> list[tuple[str, str]]:
    from slotmemory.cli.dry_run import size
    from slotmemory.cli.fit import advice
    from slotmemory.cli.prepare import DTYPES

    found: Forecast = planned.forecast
    footprint, layout = found.footprint, planned.shapes.layout
    dtype: torch.dtype = DTYPES[planned.dtype]
    parts = ", ".join(f"{name} {size(count)}" for name, count in footprint.parts.items() if count)
    text = f"; {size(footprint.text)} for the text encoder before it" if footprint.text else ""
    verdict = "it fits" if found.fits else f"it does not fit: {advice(found, dtype)}"
    if found.free is None:
        verdict = "the system does not tell what is free"
    return [
        (
            "script",
            f"{title}: {planned.schedule.chunks} chunks of {layout.width}x{layout.height}, memory {planned.memory}",
        ),
        ("takes", f"about {size(found.needed)} on {found.device} ({parts}{text}); {verdict}"),
        *([("", f"{size(found.host)} on the processor beside it ({found.resting})")] if found.host else []),
        ("", f"{footprint.tokens} tokens per layer in memory; a saved state is {size(footprint.state)} on disk"),
    ]
