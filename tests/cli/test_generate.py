"""A script in, a run folder out."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from PIL import Image

from slotmemory.run import Run
from slotmemory.video import count_chunks, read_video
from tests.cli.conftest import CHUNKS, FRAMES, words_of

FILES = ["filmstrip.png", "recipe.yaml", "script.yaml", "state.safetensors", "status.json"] + [
    "timeline.png",
    "trace.jsonl",
    "video.mp4",
]


def recipe(folder) -> dict:
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def test_a_run_holds_every_promised_file_and_frame(whole):
    assert sorted(os.listdir(whole)) == FILES
    assert count_chunks(whole / "video.mp4") == (CHUNKS, FRAMES)
    assert read_video(whole / "video.mp4").shape == (FRAMES, 3, 64, 96)
    run = Run.open(whole)
    assert run.status["status"] == "finished" and run.status["chunks"] == run.status["total"] == CHUNKS
    assert [record["shot"] for record in run.records()] == [0, 0, 0, 1, 1]
    assert run.records()[3]["switched"] and run.saved_chunks == CHUNKS
    for name in ("filmstrip.png", "timeline.png"):
        with Image.open(whole / name) as image:
            image.verify()


def test_the_end_tells_where_the_files_are_and_the_way_there_how_far_it_is(slotmemory, script, model, tmp_path):
    done = slotmemory(*words_of(script, model, tmp_path / "run"))
    assert done.status == 0
    assert done.out.splitlines()[0].startswith(f"{FRAMES} frames, 3.6 s of video, made at ")
    for name in ("video.mp4", "filmstrip.png", "timeline.png", "trace.jsonl"):
        assert str(tmp_path / "run" / name) in done.out
    lines = done.err.splitlines()
    assert lines[0].startswith("chunk 1/5  shot 1/2  ") and lines[-1].startswith("chunk 5/5  shot 2/2  ")
    assert "frames/s  0:00 left" in lines[-1] and len(lines) <= 4


def test_like_repeats_a_run_bit_for_bit(slotmemory, script, model, tmp_path):
    more = ["--seed", "11", "--memory.sink", "0", "--memory.text_by=key", "-m", "overlap=false"]
    first = slotmemory(*words_of(script, model, "first", "--budget", "90", "--steps", "1000,300", *more))
    again = slotmemory("generate", "--like", "first", "--out", "again")
    other = slotmemory("generate", "--like", "first", "--out", "other", "--seed", "12")
    assert (first.status, again.status, other.status) == (0, 0, 0), first.err + again.err + other.err
    videos = [(tmp_path / name / "video.mp4").read_bytes() for name in ("first", "again", "other")]
    assert videos[0] == videos[1] and videos[0] != videos[2]
    assert recipe(tmp_path / "first") == recipe(tmp_path / "again")


def test_the_recipe_holds_every_option_resolved(slotmemory, script, model, tmp_path):
    more = ["--memory.sink", "0", "--memory.text-by", "key", "-m", "overlap=false"]
    slotmemory(*words_of(script, model, "run", "--budget", "90", "--steps", "4", *more))
    found = recipe(tmp_path / "run")
    assert found["memory"] == "slots" and found["budget"] == 90 and found["steps"] == 4 and found["seed"] == 3
    assert found["arguments"].items() >= {"sink": 0, "text_by": "key", "overlap": False, "slots": 2, "bank": 2}.items()
    assert found["dtype"] in ("fp32", "bf16") and found["threads"] == 1 and found["version"] and found["weights"]
    assert set(found) >= {"model", "scale", "save_every", "device", "torch", "commit", "tokens"}


def test_options_of_a_script_apply_unless_a_flag_says_otherwise(slotmemory, model, tmp_path):
    script = tmp_path / "options.yaml"
    script.write_text(
        f"options: {{model: {model}, memory: sink, budget: 24, steps: 2}}\n"
        "shots: [{prompt: A red cat walks in the meadow., seconds: 0.75}]\n"
    )
    assert slotmemory("generate", script, "--out", "a").status == 0
    assert slotmemory("generate", script, "--out", "b", "--memory", "window", "--budget", "48").status == 0
    a, b = recipe(tmp_path / "a"), recipe(tmp_path / "b")
    assert (a["memory"], a["budget"], a["steps"]) == ("sink", 24, 2)
    assert (b["memory"], b["budget"], b["steps"]) == ("window", 48, 2)
    assert a["seed"] != b["seed"]  # the script names none, so each run draws its own and keeps it


def test_a_prompt_alone_is_a_script(slotmemory, model, tmp_path):
    words = ["--prompt", "The beach is empty.", "--seconds", "1.5", "--model", model, "--scale", "2"]
    done = slotmemory("generate", *words)
    assert done.status == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith("-the-beach-is-empty")
    assert Run.open(folder).script.shots[0].prompt == "The beach is empty."


def test_one_line_of_many_scripts_is_made(slotmemory, model, tmp_path):
    lines = [{"prompts": [f"The {scene} is empty."], "seconds": 0.75} for scene in ("beach", "snow")]
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    done = slotmemory(*words_of(tmp_path / "many.jsonl", model, "run", "--line", "2"))
    assert done.status == 0, done.err
    assert Run.open(tmp_path / "run").script.shots[0].prompt == "The snow is empty."


def test_a_memory_in_a_file_of_ones_own_is_used_and_remembered(slotmemory, script, model, tmp_path):
    (tmp_path / "mine.py").write_text("from slotmemory.memories.none import Nothing\nclass Mine(Nothing):\n    pass\n")
    assert slotmemory(*words_of(script, model, "run", "--memory", "mine.py")).status == 0
    assert recipe(tmp_path / "run")["memory"] == str(tmp_path / "mine.py")


def test_a_dry_run_shows_the_rounded_switch_and_writes_nothing(slotmemory, script, model, tmp_path):
    before = sorted(os.listdir(tmp_path))
    done = slotmemory("generate", script, "--model", model, "--dry-run")
    assert done.status == 0 and sorted(os.listdir(tmp_path)) == before
    (row,) = [line for line in done.out.splitlines() if "blue ghost" in line]
    # 2 s are latent 8; the switch waits for chunk 3, latent 9, whose first frame is number 33
    assert "2.00 s = latent 8" in row and "2.06 s = latent 9" in row and "3-4" in row and row.split()[-1] == "144"
    assert f"5 chunks of 3 latent frames, {FRAMES} frames" in done.out and "seed 3" in done.out
    for text in ("memory: about ", "disk: about ", "measured in a trial", "time: about ", "measured now"):
        assert text in done.out


def test_help_is_readable_and_needs_no_torch():
    code = (
        "import sys\nfrom slotmemory.cli import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit as exit:\n    assert exit.code == 0\n"
        "assert not {'torch', 'av', 'numpy'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for option in ("--memory", "--budget", "--steps", "--dry-run", "--like", "--save-every"):
        assert option in done.stdout


@pytest.mark.parametrize("words", [["--version"], []])
def test_the_bare_command_answers(slotmemory, words):
    done = slotmemory(*words)
    assert done.status == 0 and done.out and not done.err
