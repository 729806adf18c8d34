"""Whatever stops a run, what was made is kept, and `resume` ends with the files of a run that nothing stopped."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from slotmemory.cli.signals import Signals, Stopped, held
from slotmemory.cli.stream import lock
from slotmemory.run import Run
from slotmemory.video import count_chunks, read_video
from tests.cli.conftest import CHUNKS, FRAMES, words_of
from tests.disk import file_size_limit
from tests.models_for_tests import write_model


def assert_same_run(folder, whole) -> None:
    assert (folder / "video.mp4").read_bytes() == (whole / "video.mp4").read_bytes()
    assert (folder / "filmstrip.png").read_bytes() == (whole / "filmstrip.png").read_bytes()
    assert sorted(os.listdir(folder)) == sorted(os.listdir(whole))
    traces = [Run.open(path).records() for path in (folder, whole)]
    for record in (*traces[0], *traces[1]):
        del record["milliseconds"]
    assert traces[0] == traces[1]
    assert Run.open(folder).status["status"] == "finished"


def slow_memory(path, call: str, chunk: int, act: str) -> None:
    """Write a policy like `slots` that does something once, inside one of its calls during one chunk."""
    path.write_text(
        "import os, signal, time\nfrom slotmemory.memories import slots\n\n"
        "class Slow(slots.Slots):\n"
        f"    def {call}(self, state, *rest):\n"
        "        now = next(getattr(x, 'now', x) for x in rest if not isinstance(x, int))\n"
        f"        if now.chunk == {chunk} and not os.path.exists({str(path) + '.done'!r}):\n"
        f"            open({str(path) + '.done'!r}, 'w').close()\n"
        f"            {act}\n"
        f"        return super().{call}(state, *rest)\n"
    )


def test_a_killed_run_goes_on_to_the_same_frames(slotmemory, script, model, whole, tmp_path):
    slow_memory(tmp_path / "slow.py", "write", 3, "time.sleep(60)")
    words = words_of(script, model, tmp_path / "run", "--memory", tmp_path / "slow.py")
    process = subprocess.Popen([sys.executable, "-m", "slotmemory.cli", *words], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "slow.py.done").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert count_chunks(tmp_path / "run" / "video.mp4")[0] == 3  # playable; one chunk more than was saved
    assert Run.open(tmp_path / "run").saved_chunks == 2
    done = slotmemory("resume", tmp_path / "run")
    assert done.status == 0 and f"{FRAMES} frames" in done.out, done.err
    assert read_video(tmp_path / "run" / "video.mp4").equal(read_video(whole / "video.mp4"))
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "call, chunk, number",
    [("read", 0, "SIGINT"), ("update", 0, "SIGINT"), ("write", 1, "SIGTERM"), ("read", 4, "SIGINT")],
)
def test_a_stopped_run_keeps_every_finished_chunk(slotmemory, script, model, whole, tmp_path, call, chunk, number):
    slow_memory(tmp_path / "slow.py", call, chunk, f"os.kill(os.getpid(), signal.{number})")
    done = slotmemory(*words_of(script, model, "run", "--memory", "slow.py"))
    assert done.status == 128 + getattr(signal, number)
    told = [line for line in done.err.splitlines() if not line.startswith("chunk ")]
    assert len(told) == 1 and told[0].startswith(f"slotmemory: stopped; {chunk} of {CHUNKS} chunks (")
    assert told[0].endswith("are kept in run; go on with `slotmemory resume run`")
    run = Run.open(tmp_path / "run")
    assert run.status["status"] == "stopped" and run.saved_chunks == run.status["chunks"] == chunk
    assert count_chunks(run.video)[0] == chunk
    assert slotmemory("resume", "run").status == 0
    assert_same_run(run.folder, whole)


def test_ctrl_c_before_the_first_file_leaves_nothing(slotmemory, script, model, tmp_path):
    (tmp_path / "early.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = slotmemory(*words_of(script, model, "run", "--memory", "early.py"))
    assert done.status == 130 and done.err == "slotmemory: stopped before anything was made\n"
    assert not (tmp_path / "run").exists()


def test_a_signal_waits_until_a_chunk_is_written():
    done = []
    with Signals():
        with pytest.raises(Stopped) as stopped:
            with held():
                with held():
                    os.kill(os.getpid(), signal.SIGTERM)
                    done.append("inner")
                done.append("outer")
            done.append("never")
    assert done == ["inner", "outer"] and stopped.value.number == signal.SIGTERM


def test_a_disk_that_fills_up_keeps_what_was_made(slotmemory, script, model, whole, tmp_path):
    end_of_third = json.loads((whole / "trace.jsonl").read_text().splitlines()[2])["chunk"] + 1
    size = (whole / "video.mp4").stat().st_size * end_of_third // CHUNKS
    with file_size_limit(size):
        done = slotmemory(*words_of(script, model, "run"))
    assert done.status == 2
    told = [line for line in done.err.splitlines() if not line.startswith("chunk ")]
    assert len(told) == 1 and "free some space" in told[0] and "go on with `slotmemory resume run`" in told[0]
    run = Run.open(tmp_path / "run")
    assert run.status["status"] == "failed" and 1 <= run.status["chunks"] < CHUNKS
    assert read_video(run.video).equal(read_video(whole / "video.mp4", range(count_chunks(run.video)[1])))
    assert slotmemory("resume", "run").status == 0
    assert_same_run(run.folder, whole)


def test_a_finished_run_is_left_alone(slotmemory, whole):
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    done = slotmemory("resume", whole)
    assert done.status == 0 and "is finished already; nothing to do" in done.out
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_a_run_that_goes_on_elsewhere_is_not_touched(slotmemory, script, model, tmp_path):
    slow_memory(tmp_path / "slow.py", "write", 1, "os.kill(os.getpid(), signal.SIGINT)")
    slotmemory(*words_of(script, model, "run", "--memory", "slow.py"))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()}
    with lock(tmp_path / "run"):
        done = slotmemory("resume", "run")
    assert done.status == 2 and "is being written by another process" in done.err
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run").iterdir()} == before


def test_other_weights_than_the_run_began_with_are_refused(slotmemory, script, tmp_path):
    model = write_model(tmp_path / "model")
    slow_memory(tmp_path / "slow.py", "write", 1, "os.kill(os.getpid(), signal.SIGINT)")
    slotmemory(*words_of(script, model, "run", "--memory", "slow.py"))
    write_model(model, context_noise=0.2)
    done = slotmemory("resume", "run")
    assert done.status == 2 and "are no longer those run was made with" in done.err
