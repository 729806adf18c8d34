"""Policies that are wrong on purpose, at least one for every check: a check that has never failed checks nothing."""

from dataclasses import replace

import torch
from torch import nn

from slotmemory import contract
from slotmemory.backbones.attention import Buffered
from slotmemory.memories.everything import Everything
from slotmemory.memories.sink import Sink
from slotmemory.memories.window import Window
from slotmemory.memory import Bank, Memory, Prefix

SABOTEURS: dict[str, list[type[Memory]]] = {}


def fails(check):
    """Register a policy as one that `check` must catch."""

    def register(policy):
        SABOTEURS.setdefault(check.__name__, []).append(policy)
        policy.called = classmethod(lambda cls: cls.__name__)
        return policy

    return register


def changed(banks, **parts):
    return [replace(bank, **{name: change(getattr(bank, name)) for name, change in parts.items()}) for bank in banks]


@fails(contract.reads_within_its_budget)
class ReadsMore(Everything):
    """Says it has a budget and reads everything."""

    def __init__(self, layout, budget=None):
        super().__init__(layout)
        self.budget = 4 * layout.tokens_per_frame if budget is None else budget


@fails(contract.reads_within_its_budget)
class TakesMore(Window):
    """Helps itself to one frame more than it was given."""

    def __init__(self, layout, budget=None):
        super().__init__(layout, None if budget is None else budget + layout.tokens_per_frame)


@fails(contract.reads_within_its_budget)
class HearsNoBudget(Window):
    """Is given a budget and sets none."""

    def __init__(self, layout, budget=None):
        super().__init__(layout, None)
        self.budget = None


@fails(contract.holds_no_more_than_its_budget)
class Hoards(Window):
    """Reads what it should and never throws anything away."""

    def read(self, state, layer, now):
        return [bank.last(self.past) for bank in super().read(state, layer, now)]

    def update(self, state, written):
        return state


@fails(contract.repeats_itself)
class Dices(Window):
    def read(self, state, layer, now):
        return changed(super().read(state, layer, now), values=lambda v: v * (1 + 0.1 * torch.rand(())))


@fails(contract.repeats_itself)
class StartsAnywhere(Window):
    """Draws its parameters from the global generator: another process starts with others."""

    def __init__(self, layout, budget=None):
        super().__init__(layout, budget)
        self.gain = nn.Parameter(torch.rand(()) + 0.5)

    def read(self, state, layer, now):
        return changed(super().read(state, layer, now), values=lambda v: v * self.gain)


@fails(contract.keeps_rows_apart)
class Gossips(Window):
    def read(self, state, layer, now):
        return changed(super().read(state, layer, now), values=lambda v: v.mean(0, keepdim=True).expand_as(v))


@fails(contract.keeps_rows_apart)
class GossipsInside(Window):
    """Mixes the rows where nothing that is read shows it: inside attention."""

    def attend(self, state, now, read, context):
        pattern = Buffered(context)
        return lambda layer, query, key, value, hidden: pattern(layer, query, key, value.mean(0, True).expand_as(value))


@fails(contract.keeps_rows_apart)
class FollowsTheFirst(Everything):
    """Ranks items in row 0 and takes the same of every row."""

    def read(self, state, layer, now):
        found = []
        for bank in super().read(state, layer, now):
            order = bank.keys[0].flatten(1).norm(dim=1).topk(min(4, bank.items)).indices
            found.append(bank.take(order.expand(len(bank.born), -1)))
        return found


@fails(contract.edits_nothing_it_is_given)
class Counts(Window):
    def start(self, batch):
        return {**super().start(batch), "chunks": 0}

    def write(self, state, written):
        state["chunks"] += 1
        return super().write(state, written)


@fails(contract.edits_nothing_it_is_given)
class Scales(Window):
    """Edits a tensor of its state in place, while reading."""

    def read(self, state, layer, now):
        found = super().read(state, layer, now)
        for bank in found:
            bank.score.add_(1)
        return found


@fails(contract.edits_nothing_it_is_given)
class Overwrites(Window):
    """Edits what the clean pass saw."""

    def write(self, state, written):
        written.layers[0].values.mul_(0.5)
        return super().write(state, written)


@fails(contract.reads_only_the_past)
class Foresees(Window):
    """Places what it reads beside the chunk that is being made."""

    def read(self, state, layer, now):
        return [bank.at(torch.full_like(bank.born, now.frame)) for bank in super().read(state, layer, now)]


@fails(contract.reads_only_the_past)
class IsBornTomorrow(Window):
    def read(self, state, layer, now):
        return changed(super().read(state, layer, now), born=lambda b: b + 100)


@fails(contract.goes_on_exactly_after_save_and_load)
class RemembersInItself(Window):
    """Keeps a running mean in the policy, where no snapshot finds it."""

    mean = 0.0

    def start(self, batch):
        self.mean = 0.0
        return super().start(batch)

    def write(self, state, written):
        self.mean = 0.5 * self.mean + written.layers[0].values.mean()
        return super().write(state, written)

    def read(self, state, layer, now):
        return changed(super().read(state, layer, now), values=lambda v: v + self.mean)


@fails(contract.goes_on_exactly_after_save_and_load)
class CannotBeSaved(Window):
    """Holds something in its state that no file can take."""

    def start(self, batch):
        return {**super().start(batch), "generator": torch.Generator()}


@fails(contract.lets_forks_go_their_own_ways)
class SharesItsPast(RemembersInItself):
    """What a fork does goes into the same mean."""


@fails(contract.passes_gradients_to_its_parameters_only)
class Leaks(Window):
    """Forgets to cut what it keeps from the graph."""

    def write(self, state, written):
        new = []
        for layer, seen in enumerate(written.layers):
            bank = Bank.of_frames(seen.keys, seen.values, written.positions, written.frames)
            new.append(state["window"][layer].join(bank) if state["window"] else bank)
        return {**state, "window": new}


@fails(contract.passes_gradients_to_its_parameters_only)
class EditsInPlace(Window):
    def write(self, state, written):
        for seen in written.layers:
            seen.keys.mul_(1)
        return super().write(state, written)


@fails(contract.passes_gradients_to_its_parameters_only)
class LearnsNothingInside(Window):
    """Cuts the gradient of what it learns with, inside attention."""

    def __init__(self, layout, budget=None):
        super().__init__(layout, budget)
        self.gain = nn.Parameter(torch.ones(()))

    def attend(self, state, now, read, context):
        pattern = Buffered(context)
        return lambda layer, *given: self.gain.detach() * pattern(layer, *given)


@fails(contract.passes_gradients_to_its_parameters_only)
class TrainsNothing(Window):
    """Has a parameter that stands beside everything it does."""

    def __init__(self, layout, budget=None):
        super().__init__(layout, budget)
        self.gain = nn.Parameter(torch.ones(()))


@fails(contract.passes_gradients_to_its_parameters_only)
class CutsItsTokens(Window):
    """Hands the model tokens that know nothing of the weights they are made with."""

    def __init__(self, layout, budget=None):
        super().__init__(layout, budget)
        self.token = nn.Parameter(torch.ones(layout.model_width))

    def prefix(self, state, written):
        return state, Prefix(self.token.detach().expand(len(written.latents), 1, -1), torch.zeros(1, 1, 3))


@fails(contract.does_not_know_what_time_it_is)
class CountsFromTheStart(Window):
    """Places the past at the first frames of time, wherever the chunk stands."""

    def read(self, state, layer, now):
        return [bank.at(torch.arange(bank.items).expand_as(bank.born)) for bank in super().read(state, layer, now)]


@fails(contract.equals_dense_attention_when_it_may_read_everything)
class Fades(Everything):
    def read(self, state, layer, now):
        return changed(super().read(state, layer, now), values=lambda v: v * 0.9)


@fails(contract.equals_dense_attention_when_it_may_read_everything)
class DropsOne(Window):
    """Off by one: the window never holds its oldest frame."""

    def __init__(self, layout, budget=None, *, window=12):
        super().__init__(layout, budget, window=window - 1)


@fails(contract.equals_dense_attention_when_it_may_read_everything)
class MovesOne(Window):
    """Off by one: keys stand one frame too early."""

    def __init__(self, layout, budget=None, *, window=12):
        super().__init__(layout, budget, window=window)

    def read(self, state, layer, now):
        return [bank.at(bank.born - 1) for bank in super().read(state, layer, now)]


@fails(contract.equals_no_context_when_it_may_read_nothing)
class RoundsUp(Window):
    """Takes a budget of nothing for a budget of one frame."""

    def __init__(self, layout, budget=None):
        super().__init__(layout, budget if budget is None else max(budget, layout.tokens_per_frame))


@fails(contract.accounts_for_every_token)
class LooksAlike(Everything):
    """Splits each frame into two items that nobody can tell apart."""

    def write(self, state, written):
        return {"past": [bank.join(bank) for bank in super().write(state, written)["past"]]}


@fails(contract.stays_finite_in_bf16)
class IsBrittle(Window):
    """Divides by a difference that bf16 cannot tell from nothing."""

    def read(self, state, layer, now):
        return changed(super().read(state, layer, now), values=lambda v: v / (v.new_tensor(1.001) - 1) * 0.001)


@fails(contract.stays_finite_in_bf16)
class MixesPrecisions(Window):
    def read(self, state, layer, now):
        return changed(super().read(state, layer, now), values=lambda v: v.float())


@fails(contract.replays_without_repeating)
class Stutters(Everything):
    """Asks for a replay and keeps the old frames too."""

    replays = 3

    def switch(self, state, now):
        return state, 3


@fails(contract.replays_without_repeating)
class AsksForTooMuch(Sink):
    """Asks to replay frames from before the video began."""

    replays = 100

    def switch(self, state, now):
        return {"sink": [], "window": []}, 100


@fails(contract.replays_without_repeating)
class RewritesHistory(Sink):
    """Lets the replay touch the sink, which was not replayed."""

    def write(self, state, written):
        state = super().write(state, written)
        if written.now.replay:
            state = {**state, "sink": changed(state["sink"], values=lambda v: v * 0.5)}
        return state
