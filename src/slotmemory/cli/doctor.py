"""`slotmemory doctor`: what this machine offers and which parts are in place; the first thing to send with a report."""

from __future__ import annotations

import typer


def doctor(model: str = typer.Option("tiny", help="A model's name or folder.")) -> None:
    """Print versions, device, numbers' format, threads and the state of a model's weights."""
    import platform

    import torch

    from slotmemory import __version__
    from slotmemory.cli.dry_run import size
    from slotmemory.cli.prepare import dtype_for, find_device
    from slotmemory.errors import InputError
    from slotmemory.models import find, load
    from slotmemory.run import git_commit

    device = find_device(None)
    dtype, reason = dtype_for(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    rows = [
        ("slotmemory", f"{__version__}, commit {git_commit() or 'unknown'}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("device", f"{device} ({name})"),
        ("dtype", f"{dtype}: {reason}"),
        ("threads", str(torch.get_num_threads())),
    ]
    for name, value in rows:
        typer.echo(f"{name:<11}{value}")
    try:
        sources = find(model)
        total = sum(path.stat().st_size for path in sources.files())
        load(model, torch.device("cpu"), torch.float32)  # every tensor is read and checked
        place = sources.transformer.parent
        typer.echo(f"{'model':<11}{model}: {place}, {size(total)}, checksum {sources.fingerprint()}")
    except InputError as error:
        typer.echo(f"{'model':<11}{model}: not usable")
        raise InputError(f"model '{model}': {error}") from error
