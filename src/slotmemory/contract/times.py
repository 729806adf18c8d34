"""Checks of time: only the past is read, positions are relative, all of the past is dense attention, replays are clean."""

from __future__ import annotations

from dataclasses import replace

import torch

from slotmemory.contract.trials import (
    CLOSE,
    ONE_PROMPT,
    DoesNotApply,
    Trial,
    Watched,
    demand,
    demand_close,
    dense,
    latents_of,
    moment,
    tokens_of,
)
from slotmemory.memory import Bank, State, banks
from slotmemory.trace import names_of


def reads_only_the_past(trial: Trial) -> None:
    """What is read was born before the chunk and stands before it in time."""

    def around(call, method, given):
        found = method(*given)
        if call == "read":
            now = given[2]
            end = now.frame + now.frames if now.replay else now.frame  # a replay may see what it computes again
            for bank in (bank for bank in found if bank.items):
                born, place = int(bank.born.max()), float(bank.positions[..., 0].max())
                when = f"{moment(call, given)}, which starts at frame {now.frame}"
                demand(born < end, f"{trial.name} reads an item born at frame {born}{when}")
                demand(place < end, f"{trial.name} reads a key placed at {place:g}{when}")
        return found

    trial.run(Watched(trial.memory(recache=True), around))


def does_not_know_what_time_it_is(trial: Trial) -> None:
    """A stream whose latent frames are all numbered later by a constant makes the same video."""
    here = trial.session(trial.memory(recache=True))
    there = trial.session(trial.memory(recache=True))
    there.frame = 1000 * trial.engine.layout.frames_per_chunk
    demand_close(trial, latents_of(there), latents_of(here), CLOSE, "makes another video late in time")


def equals_dense_attention_when_it_may_read_everything(trial: Trial) -> None:
    """With a window as long as the video, or without a budget, it is dense causal attention."""
    trial = replace(trial, engine=replace(trial.engine, context_noise=0.0))
    frames = trial.chunks * trial.engine.layout.frames_per_chunk
    most = 0

    def around(call, method, given):
        nonlocal most
        found = method(*given)
        if call == "read":
            most = max(most, tokens_of(found))
        return found

    memory = trial.memory(window=frames, bank=0, archive=0, encoded=0, placing="native")
    found = trial.run(Watched(memory, around), prompts=ONE_PROMPT)
    if not trial.knows("window") and most < trial.engine.layout.tokens(frames - trial.engine.layout.frames_per_chunk):
        raise DoesNotApply(f"{trial.name} never reads the whole past")
    expected = dense(trial.engine, ONE_PROMPT[0], trial.chunks, (7,), past=True)
    demand_close(trial, found, expected, CLOSE, "may read everything, but is not dense causal attention")


def replays_without_repeating(trial: Trial) -> None:
    """A prompt switch replays frames that exist, leaves older items as they are and doubles none."""
    for start in (2, 4):  # in a young stream and in one that has evicted
        switches_well_at(trial, start)


def switches_well_at(trial: Trial, start: int) -> None:
    """Step a stream whose prompt changes at chunk `start`."""
    switch: tuple[State, int] | None = None  # the state before, and the frames to replay

    def around(call, method, given):
        nonlocal switch
        found = method(*given)
        if call == "switch":
            asked, made, keeps = found[1], session.frame, session.engine.memory.replays
            told = f"{trial.name} asks to replay {asked} latent frames{moment(call, given)}"
            demand(0 <= asked <= made, f"{told}, of {made} that were made")
            demand(asked <= keeps, f"{told}, but declares replays={keeps}")
            switch = given[0], asked
        return found

    session = trial.session(Watched(trial.memory(recache=True), around), {0: "a red cat", start: "a dog sleeps"})
    while not session.done:
        switch, first = None, session.frame
        session.step()
        for name, layers in banks(session.state):
            for layer, bank in enumerate(layers):
                where = f"in layer {layer} after the switch at chunk {start}"
                told = f"{trial.name} holds an item of bank '{name}' twice {where}"
                demand(len(set(names_of(bank))) == bank.items, told)
                if switch and switch[1]:
                    old = dict(banks(switch[0])).get(name)
                    changed = old and changed_before(first - switch[1], old[layer], bank)
                    told = f"{trial.name} changes the item of frame {changed}, which was not replayed, {where}"
                    demand(not changed, told)


def changed_before(frame: int, old: Bank, new: Bank) -> str | None:
    """The first item born before a frame whose keys or values are not what they were, by its birth."""
    places = {item: i for i, item in enumerate(names_of(old))}
    for i, item in enumerate(names_of(new)):
        if item in places and item[0] < frame:
            a, b = old.map(lambda x, j=places[item]: x[:, j]), new.map(lambda x, j=i: x[:, j])
            if not (torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)):
                return str(item[0])
    return None
