"""The processes of a run: this one's place among them, how they meet, and who answers signals.

A recipe's `processes` are spawned on this machine, unless something else, such as torchrun, has started them.
It knows no training.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

log = logging.getLogger(__name__)

PATIENCE = timedelta(hours=2)  # how long a process waits for another, e.g. for process 0 to validate


@dataclass(frozen=True)
class Place:
    """One of `world` processes: its number among all, and among those of its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0


def join(place: Place, device: str, threads: int, store: str | None = None) -> None:
    """Take one thread budget and meet the other processes: by a file, or as the environment says (torchrun)."""
    torch.set_num_threads(threads)
    if device != "cpu":
        torch.cuda.set_device(place.local)
    if place.world == 1:
        return
    how = {"store": dist.FileStore(store, place.world)} if store else {"init_method": "env://"}
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, rank=place.rank, world_size=place.world, timeout=PATIENCE, **how)


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def ignore_signals() -> None:
    """Let process 0 alone answer signals; if it dies, the broken connection ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def caught_signals(stopped: threading.Event) -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into a request to stop after the present step; a second Ctrl-C interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        if stopped.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        log.info("%s: stopping after this step", signal.Signals(number).name)
        stopped.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, action in before.items():
            signal.signal(number, action)
