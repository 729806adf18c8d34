"""What a training says of itself survives full disks and half lines, and knows how long it will take."""

import json
import logging
import sys
import types

import pytest

from slotmemory.training.journal import Journal, duration
from tests.disk import file_size_limit


def record(step, **changes):
    return {"step": step, "loss": 1.0 / step, "minutes": step / 60, "steps_per_second": 2.0, **changes}


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_steps_and_validations_are_one_line_each(tmp_path):
    journal = Journal(tmp_path, 10, None, 100)
    journal.step(record(1))
    journal.measured(1, {"error": 0.5})
    assert lines(tmp_path) == [record(1), {"step": 1, "validate": {"error": 0.5}}]


def test_a_full_disk_costs_lines_and_never_half_of_one(tmp_path, caplog):
    journal = Journal(tmp_path, 10, None, 100)
    journal.step(record(1))
    size = (tmp_path / "log.jsonl").stat().st_size
    with file_size_limit(size + 10):
        journal.step(record(2))
        journal.step(record(3))
    journal.step(record(4))
    assert [line["step"] for line in lines(tmp_path)] == [1, 4]
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1 and "go unlogged" in caplog.text


def test_what_came_after_the_checkpoint_is_dropped_with_half_lines(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    Journal(tmp_path, 10, None, 100).trim(2)
    assert lines(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("minutes, left", [(None, 4.0), (0.05, 1.0)])
def test_time_left_is_what_comes_first_the_steps_or_the_minutes(tmp_path, minutes, left):
    journal = Journal(tmp_path, 10, minutes, 100)
    journal.step(record(2))
    assert journal.left(record(2)) == pytest.approx(left)


def test_lines_on_a_plain_terminal_tell_losses_pace_and_time_left(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    Journal(tmp_path, 7202, None, 0).step(record(2))
    assert "step 2/7202 loss 0.5 | 2.00 steps/s, 0.0 min, 1:00:00 left" in caplog.text
    assert [duration(s) for s in (59.6, 61, 3723)] == ["1:00", "1:01", "1:02:03"]


def test_losses_are_drawn_where_tensorboard_is_installed(tmp_path, monkeypatch):
    drawn = []

    class SummaryWriter:
        def __init__(self, folder):
            drawn.append(folder)

        def add_scalar(self, name, value, step):
            drawn.append((name, value, step))

        def close(self):
            drawn.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    journal = Journal(tmp_path, 10, None, 100)
    journal.step(record(2))
    journal.measured(2, {"error": 0.5})
    journal.close()
    assert drawn == [str(tmp_path / "tensorboard"), ("loss", 0.5, 2), ("validate/error", 0.5, 2), "closed"]
