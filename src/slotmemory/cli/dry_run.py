"""What a script would become: its shots on chunks, and the memory and time to expect, without writing anything."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slotmemory.cli.progress import clock
from slotmemory.footprint import bytes_of
from slotmemory.video import Fragments

if TYPE_CHECKING:
    from slotmemory.cli.prepare import Prepared
    from slotmemory.session import Session

PREFILLED = 4  # chunks of past given to the calibration, so that it reads a memory as a stream in progress does
TIMED = 2


def print_plan(prepared: Prepared) -> None:
    """Print schedule, memory and time."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)
    schedule, layout = prepared.schedule, prepared.engine.layout
    console.print(shots_table(prepared))
    least = layout.frames_per_chunk / layout.latents_per_second
    console.print(
        f"{schedule.chunks} chunks of {layout.frames_per_chunk} latent frames, {schedule.frames} frames, "
        f"{schedule.seconds:.2f} s of video, seed {prepared.options.seed}. "
        f"A switch applies at the next chunk start; chunks are {least:g} s apart."
    )
    per_chunk = calibrate(prepared)
    for line in (memory_line(prepared), time_line(prepared, per_chunk)):
        console.print(line)


def shots_table(prepared: Prepared) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("shot", justify="right")
    table.add_column("prompt", overflow="fold")
    for name in ("asked for", "applied", "chunks", "frames", "tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in prepared.schedule.rows():
        table.add_row(
            str(row["shot"]),
            escape(row["prompt"]),
            f"{row['requested_seconds']:.2f} s = latent {row['requested_latent']:g}",
            f"{row['applied_seconds']:.2f} s = latent {row['applied_latent']}",
            f"{row['first_chunk']}-{row['last_chunk']}",
            str(row["frames"]),
            str(row["tokens"]),
        )
    return table


def memory_line(prepared: Prepared) -> str:
    """Predicted bytes, part by part."""
    engine, layout = prepared.engine, prepared.engine.layout
    weights = bytes_of(t for module in engine.modules for t in (*module.parameters(), *module.buffers()))
    # a memory without a budget of its own (`everything`) may end up with the whole video
    tokens = engine.memory.budget
    if tokens is None:
        tokens = 0 if engine.memory.called() == "none" else layout.tokens(prepared.schedule.latents)
    bank = tokens * layout.bytes_per_token(engine.dtype.itemsize)
    line = (
        f"memory: weights {size(weights)}, banks up to {size(bank)} ({tokens} tokens in each of {layout.layers} layers), "
        f"buffers to read them {size(bank)}"
    )
    resident = resident_bytes(engine.device)
    if resident is None:
        return line
    # measured after the calibration, whose own banks are part of it
    return f"{line}; about {size(resident + 2 * bank)} in all, of which {size(resident)} measured now"


def calibrate(prepared: Prepared) -> float:
    """Seconds per chunk, made and encoded, measured on a few chunks of the loaded model with a past of noise."""
    engine, layout = prepared.engine, prepared.engine.layout
    session: Session = engine.session({0: prepared.script.shots[0].prompt}, seed=0)
    shape = (1, PREFILLED * layout.frames_per_chunk, layout.latent_channels, layout.latent_height, layout.latent_width)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    session.prefill(noise.to(engine.device))
    session.step()  # warm-up
    video = Fragments(layout.fps, layout.width, layout.height, prepared.options.scale)
    times = []
    for _ in range(TIMED):
        begun = time.perf_counter()
        video.encode(session.step().frames[0], 0, 0)
        times.append(time.perf_counter() - begun)
    return statistics.mean(times)


def time_line(prepared: Prepared, per_chunk: float) -> str:
    chunks, frames = prepared.schedule.chunks, prepared.schedule.frames
    total = per_chunk * chunks
    return (
        f"time: about {clock(total)} ({frames / total:.1f} frames/s), from {TIMED} chunks measured now at "
        f"{per_chunk * 1000:.0f} ms each; loading and drawing are not counted"
    )


def resident_bytes(device: torch.device) -> int | None:
    """Most bytes that this process has held; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
        import sys
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def size(count: float) -> str:
    """Write bytes in a unit that leaves two or three digits."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
