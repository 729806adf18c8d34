"""`slotmemory bench` prints a table, keeps every race it finished, and refuses what it cannot run."""

import csv
import io
import json

import pytest
from rich.console import Console

from slotmemory.cli.progress import Shown
from slotmemory.cli.stream import lock

# like `window`, but stops the command once, in the middle of the race at the second of two budgets
STOPPED = """
import os, signal
from slotmemory.memories.window import Window
class Stopped(Window):
    def read(self, state, layer, now):
        if self.budget == 48 and now.chunk == 3 and not os.path.exists("stopped"):
            open("stopped", "w").close()
            os.kill(os.getpid(), signal.SIGINT)
        return super().read(state, layer, now)
"""


def rows_in(folder) -> dict:
    rows = json.loads((folder / "bench.json").read_text())["rows"]
    return {(row["memory"], row["budget"]): row for row in rows}


@pytest.fixture
def words(model):
    return ["--model", model, "--seconds", "4", "--chunks", "1", "--threads", "1", "--out", "found"]


def test_bench_measures_memories_at_budgets_and_leaves_files(slotmemory, words, tmp_path):
    done = slotmemory("bench", "--memories", "sink,none,sink", "--budgets", "72,own", *words)
    assert done.status == 0, done.err
    for text in ("memory", "budget", "attended", "growth", "sink", "it reads less than it may", "found/bench.png"):
        assert text in done.out
    assert done.out.count("growth") == 2  # the first race's rows, and all
    assert "race 1/2 at 72 tokens: chunk 1/6, about 0:" in done.err and "race 2/2 at own budgets" in done.err
    found = json.loads((tmp_path / "found" / "bench.json").read_text())
    listed = [(row["memory"], row["budget"], row["attended"]) for row in found["rows"]]
    assert listed == [("sink", 72, 72), ("sink", None, 144), ("none", 72, 0), ("none", None, 0)]
    assert found["settings"]["threads"] == 1 and found["settings"]["tokens_per_frame"] == 24
    assert (tmp_path / "found" / "bench.csv").is_file()


def test_a_stopped_bench_keeps_its_finished_races_and_goes_on_with_the_same_command(slotmemory, words, tmp_path):
    (tmp_path / "own.py").write_text(STOPPED)
    command = ["bench", "--memories", "own.py,none", "--budgets", "72,48", *words]
    done = slotmemory(*command)
    assert done.status == 130
    said = "slotmemory: stopped; 1 of 2 races are kept in found, the same command goes on"
    assert done.err.splitlines()[-1] == said
    first = rows_in(tmp_path / "found")
    assert list(first) == [("own.py", 72), ("none", 72)] and (tmp_path / "found" / "bench.png").is_file()
    with open(tmp_path / "found" / "bench.csv") as file:
        assert [row["memory"] for row in csv.DictReader(file)] == ["own.py", "none"]
    done = slotmemory(*command)
    assert done.status == 0, done.err
    assert "holds the races at 72 tokens already" in done.err and "race 2/2 at 48 tokens" in done.err
    whole = rows_in(tmp_path / "found")
    assert list(whole) == [("own.py", 48), ("own.py", 72), ("none", 48), ("none", 72)]
    assert {key: whole[key] for key in first} == first  # the times, too
    done = slotmemory(*command)
    assert done.status == 0 and "race 2/2" not in done.err and done.out.count("growth") == 1
    assert rows_in(tmp_path / "found") == whole


def test_budgets_and_memories_join_a_folder_later(slotmemory, words, tmp_path):
    slotmemory("bench", "--memories", "none", "--budgets", "48", *words)
    first = rows_in(tmp_path / "found")
    done = slotmemory("bench", "--memories", "none", "--budgets", "own,48", *words)
    whole = rows_in(tmp_path / "found")
    assert list(whole) == [("none", 48), ("none", None)] and whole[("none", 48)] == first[("none", 48)]
    done = slotmemory("bench", "--memories", "none,sink", "--budgets", "48", *words)
    assert "holds races at 48 tokens without some of these memories; they are run again with all" in done.err
    joined = rows_in(tmp_path / "found")
    assert list(joined) == [("none", 48), ("none", None), ("sink", 48)]
    assert joined[("none", None)] == whole[("none", None)] and joined[("none", 48)] != first[("none", 48)]


def test_a_folder_of_other_settings_or_in_use_is_left_as_it_is(slotmemory, words, tmp_path):
    command = ["bench", "--memories", "none", "--budgets", "48", *words]
    slotmemory(*command)
    before = (tmp_path / "found" / "bench.json").read_bytes()
    done = slotmemory(*command, "--seconds", "5", "--steps", "1000,250")
    assert done.status == 2 and done.err.count("\n") == 1
    for text in ("seconds 4.3125 (now 5.0625)", "steps [1000, 500] (now [1000, 250])", "choose another --out"):
        assert text in done.err
    with lock(tmp_path / "found"):
        done = slotmemory(*command)
    assert done.status == 2 and "is being written by another process" in done.err
    assert (tmp_path / "found" / "bench.json").read_bytes() == before


def test_progress_is_a_bar_on_a_terminal_and_a_line_now_and_then_elsewhere():
    def said(quiet: float, **kind) -> str:
        text = io.StringIO()
        with Shown(3, 0, "waiting", quiet, Console(file=text, width=80, **kind)) as shown:
            for done in range(1, 4):
                shown.tell(done, f"chunk {done}", "  aside", at_once=done == 1)
        return text.getvalue()

    assert said(1000.0) == "chunk 1\n" and said(0.0) == "chunk 1\nchunk 2\nchunk 3\n"
    assert "chunk 3  aside" in said(1000.0, force_terminal=True)


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--memories", "sinkk"], "unknown memory 'sinkk'; did you mean 'sink'?"),
        (["--memories", ","], "--memories names none"),
        (["--budgets", "448,many"], "--budgets 448,many: expected tokens with commas"),
        (["--budgets", "-3"], "--budgets -3: expected tokens with commas"),
        (["--seconds", "1", "--chunks", "6"], "too few to time 6 at the start and at the end"),
        (["--dtype", "fp8"], "--dtype fp8: expected fp32, bf16, fp16"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_line(slotmemory, model, tmp_path, words, expected):
    done = slotmemory("bench", "--model", model, *words)
    assert done.status == 2 and expected in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
