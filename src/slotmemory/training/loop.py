"""The training loop: one for every objective.

An objective (`objective.py`) says what to train and what the loss of a step is; the rest is here and beside: steps
(`trainer.py`), optimisers and schedules (`optimise.py`), many processes (`processes.py`, `parallel.py`), checkpoints
(`checkpoint.py`), logs, clean stops. The loop does not know what is being learnt.

A run folder holds recipe.yaml, log.jsonl, tensorboard/, checkpoint/{last,previous}[.pt], samples/ and
weights/<module>[.ema].safetensors.
Every random draw of step s on rank r comes from (seed, s, r), so a resumed run repeats the uninterrupted one bitwise.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import multiprocessing

from slotmemory.errors import InputError
from slotmemory.training import checkpoint
from slotmemory.training.journal import Journal, Watch
from slotmemory.training.objective import (
    DTYPES,
    Context,
    Objective,
    TrainingError,
    call_with,
    cast_call,
    cast_weights,
    generator_for,
    seed_for,
)
from slotmemory.training.processes import Place, caught_signals, ignore_signals, join, leave
from slotmemory.training.recipe import Recipe, dump_recipe, load_recipe
from slotmemory.training.trainer import Trainer

__all__ = [  # what objectives use, by this module's name
    "DTYPES",
    "Context",
    "Objective",
    "TrainingError",
    "call_with",
    "cast_call",
    "cast_weights",
    "generator_for",
    "seed_for",
    "train",
]

log = logging.getLogger(__name__)

RETRY = 30.0  # seconds after which a checkpoint is tried again that the disk refused


def _run(
    recipe: Recipe, folder: Path, place: Place, resume: bool, stopped: threading.Event, watch: Watch | None = None
) -> str:
    """Train in one process until done -> why it ended: steps, minutes or signal."""
    rank, trainer = place.rank, Trainer(recipe, folder, place)
    if not (resume and trainer.restore()) and recipe.init:
        trainer.initialise(Path(recipe.init))
    trainer.synchronise()
    # what the processes share takes all of them to look at; sharded weights take all of them to keep
    looks, keeps = rank == 0 or trainer.sharded or trainer.neighbours is not None, rank == 0 or trainer.sharded
    journal = Journal(folder, recipe.steps, recipe.max_minutes, recipe.print_seconds, watch) if rank == 0 else None
    if rank == 0:
        journal.trim(trainer.step)
        count = sum(parameter.numel() for parameter in trainer.parameters.values())
        log.info(
            "%s: %s from step %d of %d, %.2f M weights, %d process(es) of %d thread(s), %s",
            folder, recipe.objective, trainer.step, recipe.steps, count / 1e6, recipe.processes, recipe.threads,
            recipe.precision,
        )  # fmt: skip
    before, started = trainer.minutes, time.monotonic()
    saved, reason = started, "steps"

    def minutes() -> float:
        return before + (time.monotonic() - started) / 60

    def measure() -> None:
        nonlocal measured
        if measured == trainer.step:
            return
        measured = trainer.step
        with trainer.averaged():
            if due(recipe.validate_steps):
                results = {key: float(value) for key, value in trainer.objective.validate(trainer.step).items()}
                if results and rank == 0:
                    journal.measured(trainer.step, results)
            if due(recipe.sample_steps):
                with _samples(folder if rank == 0 else None, trainer.step) as samples:
                    trainer.objective.sample(trainer.step, samples)

    def due(interval: int) -> bool:
        return trainer.step % interval == 0 or ending

    def late() -> bool:
        return time.monotonic() - saved >= recipe.checkpoint_minutes * 60

    ending, measured = False, -1
    try:
        while trainer.step < recipe.steps:
            if recipe.max_minutes is not None and trainer.minutes >= recipe.max_minutes:
                reason = "minutes"
                break
            begun = time.monotonic()
            record, wants_stop, wants_checkpoint = trainer.advance(minutes, stopped, late)
            if rank == 0:
                pace = 1 / (time.monotonic() - begun)
                journal.step({"step": trainer.step, **record, "minutes": minutes(), "steps_per_second": pace})
            if looks and (due(recipe.validate_steps) or due(recipe.sample_steps)):
                measure()
            by_steps = recipe.checkpoint_steps and trainer.step % recipe.checkpoint_steps == 0
            if keeps and (by_steps or wants_checkpoint):
                now = time.monotonic()
                kept = trainer.try_to_save()
                saved = time.monotonic() if kept else now - recipe.checkpoint_minutes * 60 + RETRY
            if wants_stop:
                reason = "signal"
                break
        trainer.minutes = minutes()
        if looks and reason != "signal":
            ending = True
            measure()
            with trainer.averaged():
                trainer.objective.finish()
        if keeps and not trainer.try_to_save():
            raise TrainingError(f"the last checkpoint in {folder} is not of step {trainer.step}; free some space")
        if rank == 0:
            log.info("%s: stopped by %s at step %d, %.1f min", folder, reason, trainer.step, trainer.minutes)
    finally:
        if journal is not None:
            journal.close()
    return reason


def _worker(place: Place, recipe_path: str, folder: str, resume: bool, store: str) -> None:
    """Run a process other than 0 of those that `train` spawns."""
    ignore_signals()
    recipe = load_recipe(recipe_path)
    join(place, recipe.device, recipe.threads, store)
    try:
        _run(recipe, Path(folder), place, resume, threading.Event())
    except TrainingError:
        return  # process 0 found the same and tells
    finally:
        leave()


@contextmanager
def _samples(folder: Path | None, step: int) -> Iterator[Path]:
    """Where the samples of a step go; None: to no run, from a process that only helps to make them."""
    if folder is None:
        with tempfile.TemporaryDirectory() as nowhere:
            yield Path(nowhere)
        return
    samples = folder / "samples" / f"{step:07d}"
    try:
        samples.mkdir(parents=True, exist_ok=True)
        yield samples
    except OSError as error:
        log.warning("%s; no samples of step %d", InputError.from_os("write", samples, error), step)


def train(
    recipe: Recipe,
    run_folder: str | Path,
    resume: bool = True,
    watch: Watch | None = None,
    place: Place | None = None,
) -> str:
    """Train as the recipe says, in and from `run_folder` -> why it ended: "steps", "minutes" or "signal".

    resume=False refuses a folder that holds a checkpoint already. watch: told every step, see `journal.Watch`.
    place: of this process among those that something else has started (torchrun), as many as the recipe's; None: spawn
    the others here."""
    folder = Path(run_folder)
    folder.mkdir(parents=True, exist_ok=True)
    if place is not None and place.world != recipe.processes:
        raise InputError(f"{place.world} processes were started for a recipe of processes={recipe.processes}")
    if not resume and checkpoint.found(folder / "checkpoint"):
        raise InputError(f"{folder} holds a run already; resume it or choose another folder")
    if place is None or place.rank == 0:
        (folder / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
        told = {"commit": _commit(), "torch": torch.__version__}
        (folder / "run.json").write_text(json.dumps(told), encoding="utf-8")
    threads = torch.get_num_threads()
    try:
        if place is None:
            return _spawned(recipe, folder, resume, watch)
        return _launched(recipe, folder, resume, watch, place)
    finally:
        leave()
        torch.set_num_threads(threads)


def _launched(recipe: Recipe, folder: Path, resume: bool, watch: Watch | None, place: Place) -> str:
    """Train as one of the processes that are there."""
    stopped = threading.Event()
    if place.rank:
        ignore_signals()
        join(place, recipe.device, recipe.threads)
        return _run(recipe, folder, place, resume, stopped)
    with caught_signals(stopped):
        join(place, recipe.device, recipe.threads)
        return _run(recipe, folder, place, resume, stopped, watch)


def _spawned(recipe: Recipe, folder: Path, resume: bool, watch: Watch | None) -> str:
    """Start the recipe's other processes on this machine, and train as process 0."""
    stopped, world = threading.Event(), recipe.processes
    meeting = tempfile.mkdtemp(prefix="slotmemory-")
    store = str(Path(meeting) / "store")
    spawn = multiprocessing.get_context("spawn")
    arguments = (str(folder / "recipe.yaml"), str(folder), resume, store)
    workers = [spawn.Process(target=_worker, args=(Place(rank, world, rank), *arguments)) for rank in range(1, world)]
    try:
        with caught_signals(stopped):
            for worker in workers:
                worker.start()
            join(Place(0, world), recipe.device, recipe.threads, store)
            try:
                reason = _run(recipe, folder, Place(0, world), resume, stopped, watch)
            except RuntimeError as error:
                dead = [rank for rank, worker in enumerate(workers, 1) if worker.exitcode]
                if dead:
                    raise TrainingError(f"process {dead[0]} failed; its own message stands above") from error
                raise
            for worker in workers:
                worker.join()
        return reason
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
        shutil.rmtree(meeting, ignore_errors=True)


def _commit() -> str | None:
    """Name the git commit of this source tree, if it is one."""
    try:
        command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
