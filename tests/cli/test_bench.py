"""`slotmemory bench` prints a table, writes what it found, and refuses what it cannot run."""

import json

import pytest


def test_bench_measures_memories_at_budgets_and_leaves_files(slotmemory, model, tmp_path):
    words = ["--model", model, "--seconds", "4", "--chunks", "1", "--threads", "1", "--out", "found"]
    done = slotmemory("bench", "--memories", "sink,none,sink", "--budgets", "72,own", *words)
    assert done.status == 0, done.err
    for text in ("memory", "budget", "attended", "growth", "sink", "it reads less than it may", "found/bench.png"):
        assert text in done.out
    found = json.loads((tmp_path / "found" / "bench.json").read_text())
    listed = [(row["memory"], row["budget"], row["attended"]) for row in found["rows"]]
    assert listed == [("sink", 72, 72), ("sink", None, 144), ("none", 72, 0), ("none", None, 0)]
    assert found["settings"]["threads"] == 1 and found["settings"]["tokens_per_frame"] == 24
    assert (tmp_path / "found" / "bench.csv").is_file()


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
