"""What a script would become: its shots on chunks, and the memory, disk and time to expect, without writing anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from slotmemory.cli.fit import told
from slotmemory.cli.prepare import DTYPES, disk_after
from slotmemory.cli.progress import clock
from slotmemory.cli.trial import trial

if TYPE_CHECKING:
    from slotmemory.cli.prepare import Prepared
    from slotmemory.cli.trial import Trial


def print_plan(prepared: Prepared) -> None:
    """Print schedule, memory, disk and time."""
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
    planned = prepared.plan
    tried = trial(prepared)
    disk = disk_after(tried, planned, prepared.options)
    memory = told(planned.forecast, DTYPES[planned.dtype])
    for line in (f"memory: {memory[0]}", *memory[1:], f"disk: {disk}", time_line(prepared, tried)):
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


def time_line(prepared: Prepared, tried: Trial) -> str:
    chunks, frames = prepared.schedule.chunks, prepared.schedule.frames
    total = tried.seconds * chunks
    return (
        f"time: about {clock(total)} ({frames / total:.1f} frames/s), from {tried.chunks} chunks measured now at "
        f"{tried.seconds * 1000:.0f} ms each; loading and drawing are not counted"
    )
