"""What a training says of itself: log.jsonl, TensorBoard where it is installed, and how far it is.

A full disk stops no training: what cannot be written is left out, said once, and tried again with the next line.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from slotmemory.errors import InputError

log = logging.getLogger(__name__)

Watch = Callable[[Mapping[str, float]], None]  # told every step's record: step, losses, steps_per_second, seconds_left

UNSAID = ("step", "minutes", "steps_per_second", "seconds_left")  # not losses


class Journal:
    """Take down the records of a run on one process; `watch` sees each of them, else a line is logged now and then."""

    def __init__(self, folder: Path, steps: int, max_minutes: float | None, quiet: float, watch: Watch | None = None):
        self.path, self.steps, self.max_minutes, self.quiet, self.watch = (
            folder / "log.jsonl", steps, max_minutes, quiet, watch,
        )  # fmt: skip
        self.lost = 0  # lines that did not fit on the disk
        self.pace: float | None = None  # steps per second, lately
        self.told = time.monotonic()
        self.board = _board(folder)

    def trim(self, step: int) -> None:
        """Drop what was logged after the checkpoint that is resumed."""
        if self.path.exists():
            kept = []
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
                except json.JSONDecodeError:  # half a line, written when the run was killed
                    continue
            self.path.write_text("".join(kept), encoding="utf-8")

    def step(self, record: Mapping[str, float]) -> None:
        """Note one step: its number, losses, minutes and steps_per_second."""
        self._write(record)
        self._draw(record["step"], {k: v for k, v in record.items() if k not in UNSAID})
        now = record["steps_per_second"]
        self.pace = now if self.pace is None else 0.95 * self.pace + 0.05 * now
        if self.watch is not None:
            self.watch({**record, "steps_per_second": self.pace, "seconds_left": self.left(record)})
        elif time.monotonic() - self.told >= self.quiet:
            self.told = time.monotonic()
            losses = " ".join(f"{k} {v:.4g}" for k, v in record.items() if k not in UNSAID)
            log.info(
                "step %d/%d %s | %.2f steps/s, %.1f min, %s left",
                record["step"], self.steps, losses, self.pace, record["minutes"], duration(self.left(record)),
            )  # fmt: skip

    def left(self, record: Mapping[str, float]) -> float:
        """Seconds until the run ends, at the present pace."""
        seconds = (self.steps - record["step"]) / max(self.pace or 0.0, 1e-9)
        if self.max_minutes is not None:
            seconds = min(seconds, max(0.0, 60 * (self.max_minutes - record["minutes"])))
        return seconds

    def measured(self, step: int, results: Mapping[str, float]) -> None:
        """Note what a validation found."""
        self._write({"step": step, "validate": dict(results)})
        self._draw(step, {f"validate/{name}": value for name, value in results.items()})
        text = ", ".join(f"{key} {value:.4g}" for key, value in results.items())
        log.info("step %d validation: %s", step, text)

    def close(self) -> None:
        if self.board is not None:
            self.board.close()

    def _write(self, record: Mapping[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        try:
            with self.path.open("ab", buffering=0) as file:
                start = file.seek(0, 2)
                try:
                    if file.write(line) == len(line):
                        self.lost = 0
                        return
                finally:
                    if file.tell() != start + len(line):
                        file.truncate(start)  # half a line would spoil the next
            raise OSError(28, "no space left on device")
        except OSError as error:
            if not self.lost:
                log.warning("%s; steps go unlogged until then", InputError.from_os("write", self.path, error))
            self.lost += 1

    def _draw(self, step: float, values: Mapping[str, float]) -> None:
        if self.board is None:
            return
        try:
            for name, value in values.items():
                self.board.add_scalar(name, value, int(step))
        except OSError as error:
            log.warning("TensorBoard stops here: %s", error)
            self.board = None


def duration(seconds: float) -> str:
    """Write a time in hours, minutes and seconds: 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _board(folder: Path):
    """A TensorBoard writer for the run, None where the package is not installed (`pip install slotmemory[train]`)."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))
