"""Checks of what a memory may read and hold: the budget means the same for all, and the trace proves it."""

from __future__ import annotations

from dataclasses import replace

from slotmemory.contract.trials import (
    CLOSE,
    ONE_PROMPT,
    DoesNotApply,
    Trial,
    Watched,
    demand,
    demand_close,
    dense,
    moment,
    tokens_of,
)
from slotmemory.memory import banks, held_bytes


def reads_within_its_budget(trial: Trial) -> None:
    """It never reads more tokens per layer than its budget, whatever the budget."""

    def run_at(budget: int | None) -> None:
        memory = trial.memory(budget)
        limit = memory.budget  # None: no limit of its own
        if budget is not None and not memory.unlimited:
            took = "sets none" if limit is None else f"took {limit}"
            demand(
                limit is not None and limit <= budget,
                f"{trial.name} was given a budget of {budget} tokens and {took}",
            )

        def around(call, method, given):
            found = method(*given)
            if call == "read" and limit is not None:
                tokens = tokens_of(found)
                told = f"{trial.name} read {tokens} tokens{moment(call, given)}; its budget is {limit}"
                demand(tokens <= limit, told)
            return found

        trial.run(Watched(memory, around))

    per_frame = trial.engine.layout.tokens_per_frame
    for budget in (None, 0, 2 * per_frame + 5, 5 * per_frame):
        run_at(budget)


def holds_no_more_than_its_budget(trial: Trial) -> None:
    """`update` merges and evicts down to the budget, in every layer."""

    def run_at(budget: int | None) -> None:
        memory = trial.memory(budget)
        limit = memory.budget
        if limit is None:
            raise DoesNotApply(f"{trial.name} declares no budget")

        def around(call, method, given):
            found = method(*given)
            for layer in range(trial.engine.layout.layers if call == "update" else 0):
                tokens = tokens_of(layers[layer] for _, layers in banks(found))
                when = f"in layer {layer} after `update`{moment(call, given)}"
                demand(tokens <= limit, f"{trial.name} holds {tokens} tokens {when}; its budget is {limit}")
            return found

        trial.run(Watched(memory, around))

    for budget in (None, 5 * trial.engine.layout.tokens_per_frame + 3):
        run_at(budget)


def equals_no_context_when_it_may_read_nothing(trial: Trial) -> None:
    """At a budget of 0 every chunk is made from its prompt alone."""
    trial = replace(trial, engine=replace(trial.engine, context_noise=0.0))
    memory = trial.memory(0)
    if memory.budget is None:
        raise DoesNotApply(f"{trial.name} declares no budget")
    found = trial.run(memory, prompts=ONE_PROMPT)
    expected = dense(trial.engine, ONE_PROMPT[0], trial.chunks, (7,), past=False)
    demand_close(trial, found, expected, CLOSE, "shows a past at a budget of 0")


def accounts_for_every_token(trial: Trial) -> None:
    """The trace derived from its banks says exactly what was read, written, evicted and held."""
    layer = trial.engine.layout.layers // 2
    read = 0

    def around(call, method, given):
        nonlocal read
        found = method(*given)
        if call == "read" and given[1] == layer:
            read = tokens_of(found)
        return found

    session = trial.session(Watched(trial.memory(recache=True), around))

    def held() -> int:
        return tokens_of(layers[layer] for _, layers in banks(session.state))

    before, alive = 0, set()
    for chunk in session:
        trace, after = chunk.trace, held()
        size = {item["id"]: item["tokens"] for item in trace["items"]}
        lost = alive - set(size)
        demand(not lost, f"{trial.name}: the trace of chunk {chunk.index} loses sight of {', '.join(sorted(lost)[:3])}")
        alive = set(size) - set(trace["evicted"])
        evicted = sum(size[name] for name in trace["evicted"])
        told = sum(trace["read"].values())
        demand(told == read, f"{trial.name} read {read} tokens for chunk {chunk.index}, its trace says {told}")
        sentence = (
            f"{trial.name} at chunk {chunk.index}: {before} tokens + {trace['written']} written - {evicted} evicted "
            f"are not the {after} held; items of a bank must differ in birth or owner"
        )
        demand(before + trace["written"] - evicted == after, sentence)
        demand(trace["bytes"] == held_bytes(session.state), f"{trial.name}: the trace miscounts bytes")
        before = after
