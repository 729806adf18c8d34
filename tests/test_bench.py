"""The bench runs memories side by side, spends what it is given, and says in its rows what it could not do."""

import csv
import json

import pytest
import torch
from PIL import Image

from slotmemory.bench import Plan, Row, case, cases, measure, plot, write
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
    colours = {colour for _, colour in image.getcolors(10**6)}
    assert {colour_of(i) for i in range(2)} <= colours  # in the legend at least


@pytest.mark.parametrize("most, expected", [(0, 1.0), (5.3, 1.0), (4680, 1000.0), (0.07, 0.02), (1.0, 0.2), (12, 2.0)])
def test_ticks_are_round_and_few(most, expected):
    assert step(most) == pytest.approx(expected)
    assert most == 0 or most / step(most) <= 6


@torch.no_grad()
def test_the_cloning_baseline_makes_the_same_video_as_the_engine():
    from benchmarks.clone_baseline import compare

    for placing in ("native", "capped"):
        assert compare(toy(), placing, 2)[2] == 0
