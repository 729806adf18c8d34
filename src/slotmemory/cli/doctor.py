"""`slotmemory doctor`: what this machine offers, which parts are in place, and whether a job would fit."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from slotmemory.cli.disk import Disk
    from slotmemory.cli.prepare import Plan
    from slotmemory.config import Generate
    from slotmemory.script import Script

OPTIONAL = ("diffusers", "transformers", "huggingface_hub", "ftfy", "torchao", "flash_attn")


def doctor(
    script: Path | None = typer.Argument(None, help="A script: also say what it would take."),
    model: str | None = typer.Option(None, help="A preset, folder, file, or org/name of the Hub; default: tiny."),
    memory: str | None = typer.Option(None, help="The memory that the forecast is for; default: slots."),
    argument: list[str] = typer.Option([], "-m", metavar="KEY=VALUE", help="An argument of the memory; repeatable."),
    budget: int | None = typer.Option(None, help="Tokens that a layer may read from memory."),
    scale: int | None = typer.Option(None, help="As of `generate`: by how much the video is enlarged."),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1; default: a GPU where there is one."),
    dtype: str | None = typer.Option(None, help="fp32, bf16 or fp16; default: what the device is fast at."),
    quant: str | None = typer.Option(None, help="int8 or fp8: eight-bit weights in the transformer's blocks."),
    offload: str | None = typer.Option(None, help="text, codec or all: what rests on the processor beside a GPU."),
    kernel: str | None = typer.Option(None, help="Also try this attention kernel: flash_attn, flash_attn_3, flex ..."),
    trial: bool = typer.Option(
        False, "--trial", help="Also make a little of every shot, to measure how large the video gets."
    ),
) -> None:
    """Print versions, device, attention kernels, free memory and the state of a model; with a script, what it takes."""
    from slotmemory.cli.generate import resolve
    from slotmemory.config import generate_options, parse_arguments
    from slotmemory.errors import InputError
    from slotmemory.script import load_script

    flags = {"model": model, "memory": memory, "budget": budget, "scale": scale, "device": device, "dtype": dtype}
    flags |= {"quant": quant, "offload": offload, "kernel": kernel}
    arguments, told = parse_arguments(argument), None
    if script is not None:
        told = load_script(script)
        options = resolve(told, flags, arguments)
    else:
        given = {name: value for name, value in flags.items() if value is not None}
        options = generate_options({**given, "arguments": arguments})
    for name, value in _machine(options):
        _row(name, value)
    try:
        found = _model(options)
    except InputError as error:
        _row("model", f"{options.model}: not usable")
        raise InputError(_of_model(options.model, str(error))) from error
    for name, value in found:
        _row(name, value)
    if told is not None:
        for name, value in _job(options, told, told.title or script.name, trial):
            _row(name, value)


def _of_model(model: str, said: str) -> str:
    """A complaint about a model; some name it or its file already."""
    return said if model in said or str(Path(model)) in said else f"model '{model}': {said}"


def _row(name: str, value: str) -> None:
    typer.echo(f"{name:<12}{value}")


def _machine(options: Generate) -> list[tuple[str, str]]:
    import platform
    import shutil
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from slotmemory import __version__
    from slotmemory.backbones import kernels
    from slotmemory.cli.fit import free_bytes
    from slotmemory.cli.measures import size
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


def _model(options: Generate) -> list[tuple[str, str]]:
    """The state of a model's files."""
    from slotmemory.cli.measures import size
    from slotmemory.cli.prepare import DTYPES, dtype_for, find_device, on_shapes

    dtype = DTYPES[options.dtype or dtype_for(find_device(options.device))[0]]
    sources, missing, _ = on_shapes(options.model, dtype, options.quant, fetch=False)
    if sources is None:
        fetched = ", ".join(map(str, missing))
        return [("model", f"{options.model}: not on this machine yet; its first use fetches {fetched}")]
    total = sum(file.stat().st_size for file in sources.files())
    place, checksum = sources.transformer.parent, sources.fingerprint()
    return [("model", f"{options.model}: {place}, {size(total)}, checksum {checksum}")]


def _job(options: Generate, script: Script, title: str, trial: bool) -> list[tuple[str, str]]:
    """The forecast for a script; with a trial, where the model is here and fits."""
    from slotmemory.cli.prepare import plan

    planned = plan(script, options, fetch=False)
    trial = trial and planned.sources is not None and planned.forecast.fits
    return [
        *_forecast(planned, title),
        *_disk(planned, _tried(script, options, planned) if trial else planned.disk),
    ]


def _tried(script: Script, options: Generate, planned: Plan) -> Disk:
    from slotmemory.cli.prepare import disk_after, prepare
    from slotmemory.cli.trial import trial

    return disk_after(trial(prepare(script, options)), planned, options)


def _forecast(planned: Plan, title: str) -> list[tuple[str, str]]:
    from slotmemory.cli.fit import told
    from slotmemory.cli.prepare import DTYPES

    layout = planned.shapes.layout
    takes, *more = told(planned.forecast, DTYPES[planned.dtype])
    chunks = f"{planned.schedule.chunks} chunks of {layout.width}x{layout.height}"
    return [
        ("script", f"{title}: {chunks}, memory {planned.memory}"),
        ("takes", takes),
        *(("", line) for line in more),
        ("", f"{planned.forecast.footprint.tokens} tokens per layer in memory"),
    ]


def _disk(planned: Plan, disk: Disk) -> list[tuple[str, str]]:
    from slotmemory.cli.disk import advice, free_disk

    free = free_disk(Path("."))
    verdict = "it fits here"
    if free is None:
        verdict = "the system does not tell what is free"
    elif disk.least > free:
        verdict = f"it does not fit here: {advice(disk, planned.scale, free)}"
    elif disk.total + disk.beside > free:
        verdict = "it may not fit here"
    return [("disk", f"{disk}; {verdict}")]
