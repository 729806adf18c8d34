"""What every memory must hold to, as checks that any policy can be put through: the package's own and a file of yours.

A check takes a `Trial` (a policy and an engine to run it on) and raises AssertionError or InputError with a sentence,
or DoesNotApply. It knows no policy by name, no weights and no test framework.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slotmemory import memory as memories
from slotmemory.contract.budgets import (
    accounts_for_every_token,
    equals_no_context_when_it_may_read_nothing,
    holds_no_more_than_its_budget,
    reads_within_its_budget,
)
from slotmemory.contract.gradients import passes_gradients_to_its_parameters_only
from slotmemory.contract.streams import (
    edits_nothing_it_is_given,
    goes_on_exactly_after_save_and_load,
    keeps_rows_apart,
    lets_forks_go_their_own_ways,
    repeats_itself,
    stays_finite_in_bf16,
)
from slotmemory.contract.times import (
    does_not_know_what_time_it_is,
    equals_dense_attention_when_it_may_read_everything,
    reads_only_the_past,
    replays_without_repeating,
)
from slotmemory.contract.toys import ToyCodec, ToyText, toy
from slotmemory.contract.trials import (
    CLOSE,
    ONE_PROMPT,
    TWO_PROMPTS,
    DoesNotApply,
    Trial,
    Watched,
    demand,
    demand_close,
    dense,
    difference,
    latents_of,
    tokens_of,
)
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.memory import Memory

__all__ = [
    "CHECKS",
    "CLOSE",
    "ONE_PROMPT",
    "TWO_PROMPTS",
    "DoesNotApply",
    "ToyCodec",
    "ToyText",
    "Trial",
    "Verdict",
    "Watched",
    "demand",
    "demand_close",
    "dense",
    "difference",
    "examine",
    "judge",
    "latents_of",
    "tokens_of",
    "toy",
]

CHECKS: dict[str, Callable[[Trial], None]] = {
    check.__name__: check
    for check in (
        reads_within_its_budget,
        holds_no_more_than_its_budget,
        repeats_itself,
        keeps_rows_apart,
        edits_nothing_it_is_given,
        reads_only_the_past,
        goes_on_exactly_after_save_and_load,
        lets_forks_go_their_own_ways,
        passes_gradients_to_its_parameters_only,
        does_not_know_what_time_it_is,
        equals_dense_attention_when_it_may_read_everything,
        equals_no_context_when_it_may_read_nothing,
        accounts_for_every_token,
        stays_finite_in_bf16,
        replays_without_repeating,
    )
}


@dataclass(frozen=True)
class Verdict:
    """How a check ended: it holds (True), fails (False) or does not apply (None), and why."""

    check: str
    holds: bool | None
    reason: str


def examine(memory: str | type[Memory], engine: Engine | None = None, **options: Any) -> list[Verdict]:
    """Put a memory (a name, a path or a class) through all checks, on the toy engine unless another is given."""
    policy = memories.find(memory) if isinstance(memory, str) else memory
    trial = Trial(policy, engine or toy(), options)
    return [judge(name, trial) for name in CHECKS]


def judge(name: str, trial: Trial) -> Verdict:
    """Put a policy on trial through one check."""
    check = CHECKS[name]
    try:
        check(trial)
        return Verdict(name, True, (check.__doc__ or name).splitlines()[0])
    except DoesNotApply as reason:
        return Verdict(name, None, str(reason))
    except (AssertionError, InputError) as reason:
        return Verdict(name, False, str(reason))
    except Exception as error:  # whatever a policy raises is its verdict, and the other checks go on
        return Verdict(name, False, f"{trial.name} raised {type(error).__name__}: {error}")
