"""Which memories are measured at which budgets, and what stands in the row of one that cannot be.

A budget is a limit, and most memories stay below it with their own sizes. To compare them at the same cost, `window`, which
nearly all of them have, is set as large as the budget allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from slotmemory import memory as memories
from slotmemory.engine import Engine
from slotmemory.errors import InputError


@dataclass(frozen=True)
class Case:
    """One memory at one budget (tokens per layer; None: its own), as an engine; or the reason why there is none."""

    memory: str
    budget: int | None
    engine: Engine | None
    reason: str = ""

    @property
    def name(self) -> str:
        return f"{self.memory} at {'its own budget' if self.budget is None else self.budget}"


def cases(engine: Engine, names: Sequence[str], budgets: Sequence[int | None]) -> list[Case]:
    """Every memory at every budget. Raises InputError for a name that no memory has."""
    for name in names:
        memories.find(name)
    return [case(engine, name, budget) for name in names for budget in budgets]


def case(engine: Engine, name: str, budget: int | None) -> Case:
    layout, options = engine.layout, {}
    own = memories.arguments(memories.find(name)) | engine.defaults_for(name, {})
    if budget is not None and "window" in own:
        options["window"] = max(own["window"], budget // layout.tokens_per_frame + layout.frames_per_chunk)
    try:
        made = engine.with_memory(name, budget, **options)
    except InputError as error:
        return Case(name, budget, None, str(error))
    except Exception as error:  # a person's own file may raise anything
        return Case(name, budget, None, f"it cannot be made: {type(error).__name__}: {error}")
    limit = made.memory.budget
    if budget is None or limit == budget:
        return Case(name, budget, made)
    why = "it has no budget" if limit is None else f"its own limit is {limit} tokens"
    return replace(Case(name, budget, made), reason=why)
