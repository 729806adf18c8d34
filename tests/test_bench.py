"""The bench runs memories side by side, spends what it is given, and says in its rows what it could not do."""

import csv
import json

import pytest
import torch
from PIL import Image

from slotmemory.bench import Folder, Plan, Row, case, cases, measure, plot, table, write
from slotmemory.bench.picture import colour as colour_of
from slotmemory.bench.picture import step
from slotmemory.bench.streams import ratio
from slotmemory.contract import toy
from slotmemory.errors import InputError

PROMPTS = ("a red cat", "a blue dog sleeps")
PER_FRAME = toy().layout.tokens_per_frame
LATE = """
from slotmemory.memories.window import Window
class Late(Window):
    def read(self, state, layer, now):
        return 1 / 0 if now.chunk == 3 else super().read(state, layer, now)
"""


def rows_of(names, budgets, seconds=9.0, timed=2):
    engine = toy()
    return measure(engine, cases(engine, names, budgets), Plan.of(engine, budgets, seconds, timed), PROMPTS)


def test_a_window_is_made_as_large_as_the_budget_allows_and_never_smaller_than_it_was():
    assert case(toy(), "sink", 20 * PER_FRAME + 5).engine.memory.window == 23
    assert case(toy(), "rolling_sink", 2 * PER_FRAME).engine.memory.first == 2


def test_what_is_measured_is_what_was_attended_and_held():
    sink, relaxed = rows_of(["sink", "relaxed"], [7 * PER_FRAME + 3])
    assert (sink.attended, relaxed.attended) == (7 * PER_FRAME, 4 * PER_FRAME)
    per_token = 2 * toy().layout.model_width * 4 + 3 * 8  # keys and values in fp32, a position
    frames = 7 * toy().layout.layers
    assert sink.held_bytes == frames * (PER_FRAME * per_token + 8 + 8 + 4)  # and birth, owner, score of each frame
    for row in (sink, relaxed):
        times = (row.read_ms, row.write_ms, row.update_ms, row.start_ms, row.end_ms, row.growth)
        assert all(value > 0 for value in times)
        assert row.read_ms + row.write_ms + row.update_ms < row.end_ms


def test_rows_say_why_a_budget_is_not_what_is_attended():
    none, everything, relaxed = rows_of(["none", "everything", "relaxed"], [20 * PER_FRAME], seconds=4.0, timed=1)
    assert (none.attended, none.note) == (0, "it reads less than it may")
    assert everything.attended == 15 * PER_FRAME and everything.note == "it has no budget"
    assert (relaxed.attended, relaxed.note) == (4 * PER_FRAME, f"it holds {7 * PER_FRAME} tokens")


def test_a_memory_that_cannot_be_made_has_a_row_with_the_reason(monkeypatch, tmp_path):
    path = tmp_path / "picky.py"
    path.write_text(
        "from slotmemory.errors import InputError\nfrom slotmemory.memory import Memory\n"
        "class Picky(Memory):\n    def __init__(self, layout, budget=None):\n"
        "        raise InputError('budget=32 is not to my taste; use 33')\n"
    )
    sink, picky = rows_of(["sink", str(path)], [32], seconds=4.0, timed=1)
    assert sink.note == "" and picky == Row(str(path), 32, note="budget=32 is not to my taste; use 33")


def test_a_memory_that_fails_on_the_way_has_a_row_with_the_reason_and_the_others_go_on(tmp_path):
    (tmp_path / "late.py").write_text(LATE)
    late, sink = rows_of([str(tmp_path / "late.py"), "sink"], [32], seconds=4.0, timed=1)
    assert late.attended is None and late.note == (
        "memory 'late' raised ZeroDivisionError: division by zero in `read` in layer 0 at chunk 3"
    )
    assert sink.attended == 32


def test_an_unknown_memory_is_refused_before_anything_runs():
    with pytest.raises(InputError, match="unknown memory 'sinc'; did you mean 'sink'?"):
        cases(toy(), ["sink", "sinc"], [32])


def test_the_start_is_timed_once_the_largest_budget_is_full_and_the_end_at_the_end():
    plan = Plan.of(toy(), [None, 10 * PER_FRAME], seconds=15.0, timed=3)  # 20 chunks; 10 frames are 4 chunks
    moments = [plan.moment(chunk) for chunk in range(plan.total)]
    assert moments == [None] * 6 + ["start"] * 3 + [None] * 8 + ["end"] * 3
    with pytest.raises(InputError, match="are 4 chunks, too few to time 3"):
        Plan.of(toy(), [None], seconds=3.0, timed=3)


def test_between_the_moments_chunks_take_one_denoising_step(monkeypatch):
    engine, steps = toy(), []
    denoise = type(engine.sampler).denoise
    monkeypatch.setattr(
        type(engine.sampler), "denoise", lambda self, *given: steps.append(self.steps) or denoise(self, *given)
    )
    measure(engine, [case(engine, "none", None)], Plan(2, 1, 5), PROMPTS)
    assert steps[::2] == [(1000,), (1000,), (1000, 500), (1000,), (1000, 500)]
    assert Plan(2, 1, 5).passes(engine, 5) == sum(map(len, steps[::2])) + 5  # and a clean one for each


def test_a_row_says_where_its_start_was_and_how_full_its_memory_was_there():
    engine, budget = toy(), 10 * PER_FRAME
    early, late = (measure(engine, cases(engine, ["sink"], [budget]), Plan(at, 1, 8), PROMPTS)[0] for at in (1, 6))
    seconds = engine.layout.seconds
    assert (early.start_s, early.note) == (seconds(1), f"it read {3 * PER_FRAME} tokens at the start")
    assert (late.start_s, late.note) == (seconds(6), "")


def test_growth_is_what_is_left_when_the_machines_own_slowing_is_divided_out():
    assert ratio([2.0, 4.0, 90.0], [1.0, 2.0, 3.0]) == 2.0


def test_rows_are_written_as_json_and_csv_and_drawn(tmp_path):
    rows = [Row("sink", 32, 32, 1000, 1.0, 2.0, 3.0, 10.0, 11.0, 1.1), Row("sink", None, note="why"), Row("new", 32)]
    write(rows, {"model": "toy"}, tmp_path)
    plot(rows, tmp_path / "bench.png")
    whole = json.loads((tmp_path / "bench.json").read_text())
    assert whole["settings"] == {"model": "toy"} and whole["rows"] == [row.to_dict() for row in rows]
    with open(tmp_path / "bench.csv") as file:
        read = list(csv.DictReader(file))
    assert [(row["memory"], row["budget"], row["note"]) for row in read] == [
        ("sink", "32", ""),
        ("sink", "", "why"),
        ("new", "32", ""),
    ]
    image = Image.open(tmp_path / "bench.png").convert("RGB")
    assert "chunk ms at 60 s" in [column.header for column in table(rows, 60.0).columns]
    colours = {colour for _, colour in image.getcolors(10**6)}
    assert {colour_of(i) for i in range(2)} <= colours  # in the legend at least


SETTINGS = {"model": "toy", "threads": 1}


def test_a_folder_keeps_the_races_before_and_tells_which_are_missing(tmp_path):
    Folder.open(tmp_path, SETTINGS, ["sink", "none"]).add([Row("sink", None, 7), Row("none", None, 0)])
    folder = Folder.open(tmp_path, SETTINGS, ["none", "sink"])  # a table begins with what was asked for first
    assert not folder.lacks(None, ["sink", "none"]) and not folder.lacks(None, ["none"])
    assert folder.lacks(64, ["none"]) and folder.lacks(None, ["none", "sink", "window"])
    folder.add([Row("none", 64, 0)])
    folder.add([Row("none", 32, 0), Row("sink", 32, 32)])
    folder.add([Row("none", 64, 1)])  # in place of the one before
    rows = Folder.open(tmp_path, SETTINGS, ["none"]).rows
    listed = [("none", 32, 0), ("none", 64, 1), ("none", None, 0), ("sink", 32, 32), ("sink", None, 7)]
    assert [(row.memory, row.budget, row.attended) for row in rows] == listed
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.csv", "bench.png"}


def test_a_race_is_not_replaced_by_one_without_its_memories(tmp_path):
    folder = Folder.open(tmp_path, SETTINGS, ["sink", "none"])
    folder.add([Row("sink", 32), Row("none", 32)])
    with pytest.raises(InputError, match="holds a race of sink, none at budget 32, .* --memories sink,none,window, or"):
        folder.lacks(32, ["none", "window"])


def test_races_of_other_settings_or_of_a_memory_that_was_changed_are_never_mixed(tmp_path):
    own = tmp_path / "own.py"
    own.write_text("from slotmemory.memories.window import Window\nclass Own(Window):\n    pass\n")
    names = ["sink", str(own)]
    Folder.open(tmp_path, SETTINGS, names).add([Row(name, 32) for name in names])
    before = (tmp_path / "bench.json").read_bytes()
    with pytest.raises(
        InputError, match=r"other settings: threads 1 \(now 2\), steps None \(now 4\); .* another --out"
    ):
        Folder.open(tmp_path, SETTINGS | {"threads": 2, "steps": 4}, ["sink"])
    own.write_text(own.read_text() + "    replays = 1\n")
    with pytest.raises(InputError, match=r"other settings: the code of .*own\.py; "):
        Folder.open(tmp_path, SETTINGS, names)
    assert not Folder.open(tmp_path, SETTINGS, ["sink"]).lacks(32, ["sink"])  # which the change is nothing to
    assert (tmp_path / "bench.json").read_bytes() == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"settings": {}, "rows": []}', '{"settings": {"code": {}}, "rows": [{}]}']
)
def test_a_file_that_is_not_of_this_version_is_refused(tmp_path, text):
    (tmp_path / "bench.json").write_text(text)
    with pytest.raises(InputError, match="was not written by this version of `slotmemory bench`; choose another --out"):
        Folder.open(tmp_path, SETTINGS, ["sink"])


@pytest.mark.parametrize("most, expected", [(0, 1.0), (5.3, 1.0), (4680, 1000.0), (0.07, 0.02), (1.0, 0.2), (12, 2.0)])
def test_ticks_are_round_and_few(most, expected):
    assert step(most) == pytest.approx(expected)
    assert most == 0 or most / step(most) <= 6


@torch.no_grad()
def test_the_cloning_baseline_makes_the_same_video_as_the_engine():
    from benchmarks.clone_baseline import compare

    for placing in ("native", "capped"):
        assert compare(toy(), placing, 2)[2] == 0
