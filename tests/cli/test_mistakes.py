"""Every mistake is told in one line that says what to do, with exit status 2, before anything is written."""

import json
import os

import pytest

from tests.cli.conftest import words_of
from tests.models_for_tests import write_model

CAT = "{prompt: A red cat walks in the meadow., seconds: 1.5}"
SHOTS = f"shots: [{CAT}]"


def assert_one_line(done, *expected: str) -> None:
    assert done.status == 2, (done.status, done.out, done.err)
    assert done.err.count("\n") == 1 and done.err.startswith("slotmemory: "), done.err
    assert "Traceback" not in done.err and not done.out and len(done.err) < 700
    for text in expected:
        assert text in done.err


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", ["is empty; expected shots"]),
        ("shots: []", ["bad.yaml:1", "no shots"]),
        ("shots:\n- {prompt: '', seconds: 1}", ["bad.yaml:2", "shots[1].prompt", "expected a prompt"]),
        ("shots:\n- {prompt: A cat., seconds: 0}", ["shots[1].seconds", "more than 0 seconds"]),
        ("shots:\n- {prompt: A cat., seconds: -3}", ["shots[1].seconds", "more than 0 seconds"]),
        ("shots:\n- {prompt: A cat., seconds: .inf}", ["shots[1].seconds", "at most"]),
        ("shots:\n- {prompt: A cat., seconds: .nan}", ["shots[1].seconds", "more than 0 seconds"]),
        (f"shots: [{{prompt: {'x' * 10_000_000}, seconds: 1}}]", ["larger than 1 MB"]),
        (f"sead: 3\n{SHOTS}", ["bad.yaml:1", "unknown key 'sead'", "did you mean 'seed'?"]),
        (f"options: {{memori: slots}}\n{SHOTS}", ["unknown option 'memori'", "did you mean 'memory'?"]),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", ["is a binary file"]),
        ("shots:\n" + "- {prompt: A, seconds: 1}\n" * 10_000, ["more than 1000 shots"]),
        ("shots: [", ["bad.yaml:1", "not valid YAML"]),
        (f"options: {{width: 640}}\n{SHOTS}", ["width", "this model makes 48x32 pixels", "--scale"]),
        (
            "shots: [{prompt: A red kat walks in the meadow., seconds: 1.5}]",
            ["bad.yaml:1: shots[1].prompt: unknown word 'kat'", "did you mean cat"],
        ),
        (
            "shots: [{prompt: A red cat walks., seconds: 1.5}]",
            ["bad.yaml:1: shots[1].prompt", "names no scene", "meadow, beach"],
        ),
        (
            f"shots: [{CAT.replace('1.5', '1.4')}, {CAT.replace('1.5', '0.05')}, {CAT}]",
            ["shots[2].seconds", "too short"],
        ),
    ],
)
def test_a_script_that_cannot_be_made(slotmemory, model, tmp_path, content, expected):
    path = tmp_path / "bad.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_one_line(slotmemory(*words_of(path, model, "run")), *expected)
    assert os.listdir(tmp_path) == ["bad.yaml"]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--memory", "slotz"], ["unknown memory 'slotz'", "did you mean 'slots'?"]),
        (["-m", "windw=3"], ["unknown argument of memory 'slots' 'windw'", "did you mean 'window'?"]),
        (["--memory.windw", "3"], ["'windw'", "did you mean 'window'?"]),
        (["--memory.window"], ["--memory.window", "a value is missing"]),
        (["-m", "window"], ["expected key=value"]),
        (["-m", "window=wide"], ["window=wide", "expected a whole number such as 12"]),
        (["-m", "window=1"], ["memory 'slots'", "window=1 cannot hold"]),
        (["-m", "slots=-1"], ["memory 'slots'", "slots=-1"]),
        (["-m", "placing=nativ"], ["unknown placing 'nativ'", "did you mean 'native'?"]),
        (["--memory", "lost.py"], ["memory file lost.py does not exist"]),
        (["--memory", "broken.py"], ["broken.py cannot be loaded", "SyntaxError"]),
        (["--budget", "-5"], ["budget", "greater than or equal to 0", "got -5"]),
        (["--budget", "many"], ["--budget", "valid integer"]),
        (["--steps", "four"], ["--steps four", "1000,750,500,250"]),
        (["--steps", "0"], ["steps", "from 1 to 1000"]),
        (["--steps", "250,500"], ["steps", "numbers that fall"]),
        (["--seed", "-1"], ["seed", "got -1"]),
        (["--scale", "0"], ["scale", "got 0"]),
        (["--save-every", "0"], ["save_every", "got 0"]),
        (["--threads", "0"], ["threads", "got 0"]),
        (["--dtype", "fp8"], ["dtype", "'fp32', 'bf16' or 'fp16'", "got fp8"]),
        (["--device", "gpu"], ["device 'gpu' cannot be used here"]),
        (["--model", "tyni"], ["unknown model 'tyni'"]),
        (["--modle", "tiny"], ["No such option", "--model", "generate --help"]),
        (["--line", "7"], ["has no script on line 7"]),
        (["--like", "run"], ["a script and --like exclude each other"]),
        (["--prompt", "A cat."], ["a script and --prompt exclude each other"]),
        (["--out", "taken"], ["taken exists and is not empty", "another --out"]),
        (["--out", "script.yaml"], ["script.yaml is a file, not a folder"]),
        (["--out", "script.yaml/run"], ["a part of the path is a file"]),
        (["--out", "/proc/run"], ["cannot make the run folder /proc/run"]),
    ],
)
def test_an_option_that_cannot_be_met(slotmemory, script, model, tmp_path, words, expected):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    (tmp_path / "broken.py").write_text("class Mine(:\n")
    before = sorted(os.listdir(tmp_path))
    assert_one_line(slotmemory(*words_of(script, model, "run", *words)), *expected)
    assert sorted(os.listdir(tmp_path)) == before and os.listdir(tmp_path / "taken") == ["thesis.tex"]


@pytest.mark.parametrize(
    "words, expected",
    [
        (["generate"], ["what to show is missing"]),
        (["generate", "nowhere.yaml"], ["cannot read the script nowhere.yaml", "no such file"]),
        (["generate", "many.jsonl"], ["many.jsonl holds 2 scripts; choose a line, 1 to 2"]),
        (["generate", "--prompt", "", "--seconds", "2"], ["prompt", "expected a prompt"]),
        (["generate", "--prompt", "A cat.", "--seconds", "0"], ["more than 0 seconds"]),
        (["generate", "--prompt", "A cat.", "--line", "2"], ["there is no file to choose a line of"]),
        (["generate", "--like", "nowhere"], ["nowhere does not exist; expected a run folder"]),
        (["resume", "nowhere"], ["nowhere does not exist; expected a run folder"]),
        (["resume", "empty"], ["empty is not a run folder"]),
        (["resume"], ["Missing argument", "resume --help"]),
        (["generat"], ["No such command", "generat"]),
        (["memories", "slotz"], ["did you mean 'slots'?"]),
        (["train", "nowhere.yaml"], ["cannot read nowhere.yaml"]),
        (["train", "empty"], ["cannot read empty"]),
    ],
)
def test_a_command_that_cannot_be_followed(slotmemory, tmp_path, words, expected):
    lines = [json.dumps({"prompts": ["The beach is empty."]})] * 2
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    (tmp_path / "empty").mkdir()
    assert_one_line(slotmemory(*words), *expected)
    assert sorted(os.listdir(tmp_path)) == ["empty", "many.jsonl"]


@pytest.mark.parametrize("name", ["transformer", "words", "codec"])
@pytest.mark.parametrize("keep", [None, 0, 7, 500, -100])
def test_weights_that_are_missing_or_break_off(slotmemory, script, tmp_path, name, keep):
    path = write_model(tmp_path / "model") / f"{name}.safetensors"
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    expected = "no weights at" if keep is None else "is truncated or no safetensors file"
    assert_one_line(slotmemory(*words_of(script, tmp_path / "model", "run")), expected, f"{name}.safetensors")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text, expected",
    [("{", "is no JSON"), ("[]", "holds a list, expected an object"), ('{"height": "tall"}', "'height' is tall")],
)
def test_a_model_with_damaged_settings(slotmemory, script, tmp_path, text, expected):
    (write_model(tmp_path / "model") / "model.json").write_text(text)
    assert_one_line(slotmemory(*words_of(script, tmp_path / "model", "run")), expected, "model.json")


def test_a_run_whose_recipe_was_changed(slotmemory, whole, tmp_path):
    for name in ("recipe.yaml", "script.yaml"):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_bytes((whole / name).read_bytes())
    text = (whole / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(text.replace("seed: 3", "sead: 3"))
    assert_one_line(slotmemory("resume", "run"), "recipe.yaml lacks 'seed'")
    (tmp_path / "run" / "recipe.yaml").write_text(text.replace("scale: 2", "scale: big"))
    assert_one_line(slotmemory("resume", "run"), "recipe.yaml: scale", "got big")


def test_a_fault_of_a_policy_names_it_and_shows_its_traceback_with_debug(slotmemory, script, model, tmp_path):
    (tmp_path / "faulty.py").write_text(
        "from slotmemory.memories.none import Nothing\n\nclass Faulty(Nothing):\n"
        "    def write(self, state, written):\n        raise RuntimeError('two\\nlines')\n"
    )
    done = slotmemory(*words_of(script, model, "run", "--memory", "faulty.py"))
    assert done.status == 2 and done.err.count("\n") == 1 and "Traceback" not in done.err
    assert "memory 'faulty' raised RuntimeError: two lines in `write` at chunk 0" in done.err
    done = slotmemory(*words_of(script, model, "other", "--memory", "faulty.py", "--debug"))
    assert done.status == 2 and "Traceback" in done.err and "faulty.py" in done.err


def test_a_fault_of_ours_asks_for_a_report_and_shows_its_traceback_with_debug(slotmemory, script, model, monkeypatch):
    def broken(*_):
        raise RuntimeError("two\nlines")

    monkeypatch.setattr("slotmemory.session.to_uint8", broken)
    done = slotmemory(*words_of(script, model, "run"))
    assert done.status == 1 and done.err.count("\n") == 1 and "Traceback" not in done.err
    assert "unexpected RuntimeError: two lines" in done.err and "--debug" in done.err
    done = slotmemory(*words_of(script, model, "other", "--debug"))
    assert done.status == 1 and "Traceback" in done.err and "broken" in done.err
