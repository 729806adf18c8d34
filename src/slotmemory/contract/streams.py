"""Checks of streams: the same again, apart from its neighbours, cut, forked, halved in precision, nothing edited."""

from __future__ import annotations

import copy
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from slotmemory.contract.trials import CLOSE, Trial, Watched, demand, demand_close, difference, moment
from slotmemory.memory import Written


def repeats_itself(trial: Trial) -> None:
    """Built and run again with the same seed it makes the same bits, whatever the global random state."""
    found = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found.append(trial.run())
    demand_close(trial, found[0], found[1], 0, "makes another video when the same stream is run again")


def keeps_rows_apart(trial: Trial) -> None:
    """A batch of two streams makes what the two make alone."""
    together = trial.run(seeds=(7, 8))
    for row, seed in enumerate((7, 8)):
        alone = trial.run(seeds=(seed,))
        demand_close(trial, together[row : row + 1], alone, CLOSE, f"lets batch row {row} depend on its neighbour")


def edits_nothing_it_is_given(trial: Trial) -> None:
    """State in, state out: read, attend, prefix, write, update and switch leave their arguments as they were."""

    def around(call, method, given):
        # a pattern is the policy's own, made for this chunk
        shown = [replace(part, pattern=None) if isinstance(part, Written) else part for part in given]
        before = copy.deepcopy(shown)
        found = method(*given)
        names = {
            "read": ("state", "layer", "now"),
            "attend": ("state", "now", "read", "context"),
            "switch": ("state", "now"),
        }.get(call, ("state", "written"))
        for name, old, new in zip(names, before, shown):
            changed = difference(old, new, name)
            told = f"{trial.name} changes {changed} in `{call}`{moment(call, given)}; return a new state, edit none"
            demand(changed is None, told)
        return found

    trial.run(Watched(trial.memory(recache=True), around))


def goes_on_exactly_after_save_and_load(trial: Trial) -> None:
    """A stream saved to a file and loaded on a newly built memory goes on to the bit, wherever it was cut."""
    whole = trial.run(trial.memory(recache=True))
    session, made = trial.session(trial.memory(recache=True)), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        while not session.done:
            try:
                session.save(path)
            except TypeError as error:
                raise AssertionError(f"{trial.name} holds what cannot be saved: {error}") from error
            session = trial.session(trial.memory(recache=True), prompts={0: "not this"}, seeds=(99,))
            session.load(path)
            made.append(session.step().latents)
    demand_close(trial, torch.cat(made, 1), whole, 0, "does not go on exactly after save and load")


def lets_forks_go_their_own_ways(trial: Trial) -> None:
    """A fork starts as the same stream; what happens to one of the two never shows in the other."""
    memory = trial.memory()
    whole = trial.run(trial.memory())
    session, made = trial.session(memory), []
    for chunk in range(trial.chunks):
        fork, twin = session.fork(), session.fork()
        fork.prompt("something quite different")
        fork.step()
        made.append(session.step().latents)
        if chunk in (1, trial.chunks - 1):
            demand_close(trial, twin.step().latents, made[-1], 0, "makes another chunk in a fork", chunk)
    demand_close(trial, torch.cat(made, 1), whole, 0, "lets a fork change the stream it came from")


def stays_finite_in_bf16(trial: Trial) -> None:
    """With a model in bf16 it makes finite latents."""
    halved = copy.deepcopy(trial.engine.backbone).to(torch.bfloat16)
    engine = replace(trial.engine, backbone=halved)
    try:
        found = trial.run(trial.memory(recache=True).to(torch.bfloat16), engine=engine, seeds=(7, 8))
    except RuntimeError as error:
        raise AssertionError(f"{trial.name} cannot run in bf16: {error}") from error
    demand(bool(found.isfinite().all()), f"{trial.name} is not finite in bf16")
