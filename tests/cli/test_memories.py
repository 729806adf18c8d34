"""`slotmemory memories`: all are listed, one is told, and a policy of yours is put through the contract."""

from pathlib import Path

from slotmemory import memory
from slotmemory.contract import CHECKS
from slotmemory.engine import Engine
from slotmemory.memory import Memory
from slotmemory.video import count_chunks
from tests.cli.conftest import words_of
from tests.models_for_tests import SETTINGS, write_model

ELSEWHERE = Path(__file__).parents[1] / "contract" / "every_other.py"
GREEDY = """
from slotmemory.memories.window import Window

class Greedy(Window):
    def update(self, state, written):
        return state if written.now.chunk == 2 else super().update(state, written)
"""


def sections(out: str) -> dict[str, str]:
    """What is printed of each memory, by its name."""
    found, name = {}, ""
    for line in out.splitlines():
        if line and not line.startswith(" ") and line.split()[0] in memory.names():
            name = line.split()[0]
        found[name] = found.get(name, "") + line + "\n"
    return found


def test_every_policy_is_listed_with_budget_positions_arguments_and_source(slotmemory, model):
    done = slotmemory("memories", "--model", model)
    assert done.status == 0, done.err
    told = sections(done.out)
    for name in memory.names():
        for title in ("budget", "positions", "arguments", "source"):
            assert f"\n  {title}" in told[name], (name, title)
    assert "144 tokens per layer (6 latent frames)" in told["window"]  # window: 9 less the chunk itself
    assert "text_weight=0.7" in told["slots"] and "arXiv 2605.31033" in told["slots"]
    assert "positions  block-relative" in told["merged"] and "positions  native" in told["sink"]


def test_every_policy_of_the_package_names_its_source():
    assert [name for name in memory.names() if memory.find(name).source == Memory.source] == []


def test_one_memory_is_told_in_full_by_its_name_alone(slotmemory, model):
    done = slotmemory("memories", "slots", "--model", model)
    assert "What the paper leaves open" in done.out and "tokens_per_slot: tokens of an item" in done.out
    assert done == slotmemory("memories", "show", "slots", "--model", model)


def test_a_policy_outside_the_package_does_not_inherit_a_paper(slotmemory, model, tmp_path):
    (tmp_path / "greedy.py").write_text(GREEDY)
    assert "source     not stated" in slotmemory("memories", "greedy.py", "--model", model).out


def test_an_unknown_memory_answers_with_the_nearest_name(slotmemory):
    done = slotmemory("memories", "slotz")
    assert done.status == 2 and "unknown memory 'slotz'; did you mean 'slots'?" in done.err


def test_a_file_that_keeps_the_contract_passes_with_a_line_per_check(slotmemory):
    done = slotmemory("memories", "check", ELSEWHERE)
    assert done.status == 0, done.out
    lines = done.out.splitlines()
    assert len(lines) == len(CHECKS) + 1 and lines[-1] == "memory 'every_other' keeps the contract"
    assert all(line.split()[0] in ("holds", "excused") and line.split()[1] in CHECKS for line in lines[:-1])


def test_a_file_that_breaks_it_fails_with_name_chunk_and_layer_and_status_1(slotmemory, tmp_path):
    (tmp_path / "greedy.py").write_text(GREEDY)
    done = slotmemory("memories", "check", "greedy.py", "-m", "window=6")
    assert done.status == 1 and not done.err
    (line,) = [line for line in done.out.splitlines() if "holds_no_more_than_its_budget" in line]
    told = "memory 'greedy' holds 96 tokens in layer 0 after `update` at chunk 2; its budget is 48"
    assert line.startswith("FAILS") and line.endswith(told)
    assert f"of {len(CHECKS)} checks" in done.out.splitlines()[-1]


def test_a_file_that_cannot_be_loaded_is_said_in_one_line(slotmemory, tmp_path):
    (tmp_path / "broken.py").write_text("def (:")
    done = slotmemory("memories", "check", "broken.py")
    assert (
        done.status == 2 and "memory broken.py cannot be loaded: SyntaxError" in done.err and "\n" not in done.err[:-1]
    )


def test_an_argument_that_the_policy_lacks_answers_with_the_nearest_one(slotmemory):
    done = slotmemory("memories", "check", "window", "-m", "windw=3")
    assert done.status == 2 and "did you mean 'window'?" in done.err


def test_a_policy_that_fails_in_the_middle_leaves_what_was_made_playable(slotmemory, model, script, tmp_path):
    (tmp_path / "late.py").write_text(
        "from dataclasses import replace\n"
        "from slotmemory.memories.window import Window\n"
        "class Late(Window):\n"
        "    def read(self, state, layer, now):\n"
        "        found = super().read(state, layer, now)\n"
        "        late = now.chunk == 3 and layer == 1\n"
        "        return [replace(bank, values=bank.values * float('nan')) for bank in found] if late else found\n"
    )
    done = slotmemory(*words_of(script, model, "run", "--memory", "late.py"))
    assert done.status == 2
    assert "memory 'late' read values that are not finite in layer 1 at chunk 3" in done.err
    assert "3 of 5 chunks" in done.err and "slotmemory resume" in done.err
    assert count_chunks(tmp_path / "run" / "video.mp4") == (3, 33)  # 9 latent frames


def test_the_budget_listed_is_the_one_that_a_stream_gets_also_where_settings_are_for_one_policy(slotmemory, tmp_path):
    folder = write_model(tmp_path / "own", memory=SETTINGS["memory"] | {"for": {"slots": {"window": 6}}})
    for name in ("slots", "sink"):
        budget = Engine.from_pretrained(str(folder), memory=name).memory.budget
        assert f"budget     {budget} tokens per layer" in slotmemory("memories", name, "--model", folder).out
    assert "96 tokens per layer" in slotmemory("memories", "slots", "--model", folder).out  # 168 with a window of 9
