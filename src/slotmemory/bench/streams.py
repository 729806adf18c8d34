"""Streams of many memories beside each other: what a chunk costs with each, and whether that grows with the video.

All streams of a race take turns chunk by chunk in one process, and nobody always comes first, so that a busy machine
slows all alike. One stream has no memory: how much slower it got between start and end is the machine's doing, and is
divided out of everybody's growth. Between the two moments that are timed, chunks are made in a single denoising step.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from slotmemory.bench.choices import Case, case
from slotmemory.contract import Watched, tokens_of
from slotmemory.engine import Engine
from slotmemory.errors import InputError, shorten
from slotmemory.memory import banks, held_bytes
from slotmemory.session import Session

SHOT_CHUNKS = 13
CONTROL = "none"
CALLS = ("read", "write", "update")
MARGIN = 2  # chunks after which a memory of so many tokens is surely full


@dataclass(frozen=True)
class Row:
    """What one memory at one budget cost. Times in milliseconds per chunk, medians, all layers together.

    attended: most tokens of memory that a layer read; start_s: seconds of video at the start; growth: chunk time at the
    end over that at the start, less what the stream without memory slowed down by; note: what has to be known to read
    the row, or why it is empty.
    """

    memory: str
    budget: int | None
    attended: int | None = None
    held_bytes: int | None = None
    read_ms: float | None = None
    write_ms: float | None = None
    update_ms: float | None = None
    start_s: float | None = None
    start_ms: float | None = None
    end_ms: float | None = None
    growth: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def clock(device: torch.device) -> float:
    """Seconds. Work that was only handed to an accelerator is waited for; on one thread of a CPU it is the processor's
    own time, so that whatever else the machine does is not counted."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif torch.get_num_threads() == 1:
        return time.thread_time()
    return time.perf_counter()


class Stream:
    """One memory's stream: its session, and what its chunks took."""

    def __init__(self, case: Case, prompts: Mapping[int, str]):
        self.case = case
        self.spent = dict.fromkeys(CALLS, 0.0)
        self.attended, self.at_start, self.fault = 0, 0, ""
        self.times: dict[str, list[float]] = {"start": [], "end": []}
        self.calls: dict[str, list[float]] = {name: [] for name in CALLS}
        watched = Watched(case.engine.memory, self._around)
        self.engine = replace(case.engine, memory=watched)
        self.session: Session | None = self.engine.session(dict(prompts), 0)

    def _around(self, call: str, method: Callable, given: tuple) -> Any:
        begun = clock(self.engine.device)
        found = method(*given)
        if call in CALLS:
            self.spent[call] += clock(self.engine.device) - begun
        if call == "read":
            self.attended = max(self.attended, tokens_of(found))
        return found

    def step(self, moment: str | None) -> None:
        """Make a chunk, and time it where it is one of a moment's. A memory that fails leaves the race with its reason."""
        if self.session is None:
            return
        self.session.engine = self.engine if moment else self.engine.with_steps((1000,))
        self.spent = dict.fromkeys(CALLS, 0.0)
        begun = clock(self.engine.device)
        try:
            self.session.step()
        except InputError as error:
            self.session, self.fault = None, str(error)
            return
        if moment:
            self.times[moment].append(1000 * (clock(self.engine.device) - begun))
            if moment == "start":
                self.at_start = self.attended
            for name in CALLS:
                self.calls[name].append(1000 * self.spent[name])

    def row(self, control: Stream, start_s: float) -> Row:
        empty = Row(self.case.memory, self.case.budget, note=self.fault)
        if self.fault:
            return empty
        limit, note = self.case.budget, self.case.reason
        if not note and limit is not None and self.attended + self.engine.layout.tokens_per_frame <= limit:
            held = tokens_of(layers[0] for _, layers in banks(self.session.state))
            note = f"it holds {held} tokens" if held > self.attended else "it reads less than it may"
        if not note and self.at_start < self.attended:
            note = f"it read {self.at_start} tokens at the start"
        start, end = (statistics.median(self.times[moment]) for moment in ("start", "end"))
        read, write, update = (statistics.median(self.calls[name]) for name in CALLS)
        growth = ratio(self.times["end"], control.times["end"]) / ratio(self.times["start"], control.times["start"])
        return replace(
            empty,
            attended=self.attended,
            held_bytes=held_bytes(self.session.state),
            read_ms=read,
            write_ms=write,
            update_ms=update,
            start_s=start_s,
            start_ms=start,
            end_ms=end,
            growth=growth,
            note=note,
        )


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of chunks that were made in the same turn."""
    return statistics.median(a / b for a, b in zip(times, others))


@dataclass(frozen=True)
class Plan:
    """Chunks of a stream: `first` is the first that is timed at the start, `timed` of them; as many end at `total`."""

    first: int
    timed: int
    total: int

    @classmethod
    def of(cls, engine: Engine, budgets: Sequence[int | None], seconds: float, timed: int) -> Plan:
        """The start is where the largest of the budgets is full, so that filling up does not look like growth."""
        total = engine.layout.chunks(seconds)
        if total < 2 * timed:
            raise InputError(
                f"{seconds:g} s are {total} chunks, too few to time {timed} at the start and at the end; "
                f"use at least {engine.layout.seconds(2 * timed):.0f} s or fewer chunks"
            )
        largest = max((budget for budget in budgets if budget is not None), default=0)
        full = -(-largest // engine.layout.tokens_per_chunk) + MARGIN
        return cls(min(full, total - 2 * timed), timed, total)

    def moment(self, chunk: int) -> str | None:
        if self.first <= chunk < self.first + self.timed:
            return "start"
        return "end" if chunk >= self.total - self.timed else None

    def passes(self, engine: Engine, chunks: int) -> int:
        """Of the transformer in a stream's first `chunks`: those that denoise, and a clean one per chunk."""
        timed = sum(self.moment(chunk) is not None for chunk in range(chunks))
        return 2 * chunks + (len(engine.sampler.timesteps) - 1) * timed


def measure(
    engine: Engine,
    listed: Sequence[Case],
    plan: Plan,
    prompts: Sequence[str],
    told: Callable[[int], None] = lambda chunks: None,
) -> list[Row]:
    """Run one race, all cases side by side -> a row for each, in the order given. `told` hears the number of turns done."""
    starts = range(0, plan.total, SHOT_CHUNKS)
    script = dict(zip(starts, itertools.cycle(prompts)))
    control = Stream(case(engine, CONTROL, None), script)
    streams = [Stream(each, script) if each.engine else None for each in listed]
    racing = [control, *(stream for stream in streams if stream)]
    for chunk in range(plan.total):
        first = chunk % len(racing)
        for stream in racing[first:] + racing[:first]:
            stream.step(plan.moment(chunk))
        told(chunk + 1)
    start_s = engine.layout.seconds(plan.first)
    return [
        stream.row(control, start_s) if stream else Row(each.memory, each.budget, note=shorten(each.reason, 200))
        for each, stream in zip(listed, streams)
    ]
