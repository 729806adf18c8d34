"""Every memory keeps the contract, and every check of the contract is seen to fail on a policy that breaks it."""

from pathlib import Path

import pytest

from slotmemory import contract, memory
from slotmemory.contract import CHECKS, DoesNotApply, Trial, examine
from slotmemory.errors import InputError
from tests.contract.saboteurs import SABOTEURS, Hoards, ReadsMore

ELSEWHERE = str(Path(__file__).with_name("every_other.py"))
# beside every memory as it comes: arguments that change what it does
VARIANTS = [
    ("window", dict(placing="relative")),
    ("sink", dict(recache=True, global_sink=False)),
    ("slots", dict(top_k=2, overlap=False, store="balanced", standardise=True, placing="capped", reach=9)),
    ("slots", dict(evict="redundancy", bank=2, record_every=1, floor=1)),
    ("slots", dict(sink=0, exclusive=False, text_by="key", store="all", placing="relative")),
    ("narrative", dict(active=2, sink=2, recache=False, placing="relative")),
    ("infinity", dict(cuts="all", flush=1)),
    ("deep_sink", dict(compressed=0)),
    ("decoupled", dict(top_blocks=5, gate=0.5, placing="native")),
    ("merged", dict(sink=0, short=0.0, pool="frame")),
    ("rolling_sink", dict(recent=1, roll=False)),
    ("relaxed", dict(history=2, placing="relative")),
    ("anchored", dict(recache=False, junction=2)),
    ("evicted", dict(score="observed", sink=1, tile=1)),
    ("evicted", dict(score="expected", placing="capped", reach=9)),
    ("history", dict(rate="2x2x4", keep="recent", placing="capped", reach=9)),
    ("packed", dict(schedule="f4k2f2k1")),
]
CASES = [(name, {}) for name in (*memory.names(), ELSEWHERE)] + VARIANTS


def label(value):
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items()) or "default"
    return Path(value).stem if isinstance(value, str) and value.endswith(".py") else None


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name, options", CASES, ids=label)
def test_every_memory_keeps_the_contract(name, options, check):
    try:
        CHECKS[check](Trial(memory.find(name), options=options))
    except DoesNotApply:
        # only a policy without a budget, or one that never reads the whole past, has anything to be excused from
        assert name in ("none", "everything", "relaxed", "packed", ELSEWHERE)


@pytest.mark.parametrize("check, policy", [(c, p) for c, found in SABOTEURS.items() for p in found])
def test_every_check_fails_on_its_saboteurs_and_names_them(check, policy):
    with pytest.raises((AssertionError, InputError), match=f"memory '{policy.__name__}'"):
        CHECKS[check](Trial(policy))


def test_every_check_has_a_saboteur():
    assert set(SABOTEURS) == set(CHECKS)


def test_a_memory_that_reads_more_than_its_budget_is_stopped_by_the_session_with_its_name_and_the_number():
    trial = Trial(ReadsMore)
    with pytest.raises(InputError, match=r"memory 'ReadsMore' read 96 tokens in layer 0 at chunk 2; its budget is 64"):
        trial.run()


def test_examining_a_memory_gives_one_verdict_per_check_with_a_sentence():
    found = {v.check: v for v in examine(Hoards)}
    assert list(found) == list(CHECKS)
    assert all(v.reason for v in found.values())
    assert found["repeats_itself"].holds
    held = found["holds_no_more_than_its_budget"]
    assert held.holds is False and "'Hoards' holds" in held.reason


def test_a_policy_that_raises_is_a_failed_verdict_and_not_a_crash(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(
        "from slotmemory.memory import Memory\n"
        "class Broken(Memory):\n"
        "    def read(self, state, layer, now):\n"
        "        return state['nothing']\n"
    )
    verdicts = examine(str(path))
    assert [v.holds for v in verdicts if v.check == "repeats_itself"] == [False]
    assert any("memory 'broken' raised KeyError: 'nothing'" in v.reason for v in verdicts)


def test_the_toy_tells_streams_apart_by_far_more_than_the_tolerance():
    kept, bare = (Trial(memory.find(name)).run() for name in ("everything", "none"))
    assert float((kept - bare).abs().max()) > 100 * contract.CLOSE
