"""Scripts from YAML and JSON Lines: what is read, when shots switch, and that only InputError ever comes out."""

import json
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slotmemory.errors import InputError
from slotmemory.layout import Layout
from slotmemory.script import (
    MAX_PROMPT,
    MAX_SHOTS,
    OPTIONS,
    Script,
    Shot,
    load_script,
    load_scripts,
    parse_yaml,
)

LAYOUT = Layout(48, 80, layers=2, heads=2, head_dim=8, text_tokens=16)
EXAMPLES = Path(__file__).parent.parent / "examples"
FUZZ = settings(
    derandomize=True,
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def complaint(path: Path, content: str | bytes) -> str:
    """The one line that reading such a file gives, without its folder."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(InputError) as caught:
        load_scripts(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message.replace(f"{path.parent}/", "")


# reading


def test_a_yaml_script_is_read(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "title: Lost\nseed: 3\noptions: {memory: slots, budget: 640, width: 80}\n"
        "shots:\n- prompt: A red cat\n    walks.\n  seconds: 2.5\n- {prompt: 'B', seconds: 4}\n"
    )
    expected = Script(
        (Shot("A red cat walks.", 2.5), Shot("B", 4)), 3, "Lost", {"memory": "slots", "budget": 640, "width": 80}
    )
    assert load_script(path) == expected
    assert load_scripts(path) == [expected]


def test_a_bare_list_of_shots_is_a_script(tmp_path):
    path = tmp_path / "a.yml"
    path.write_text("- prompt: A\n  seconds: 1\n- prompt: B\n  seconds: 1e1\n")
    assert [shot.seconds for shot in load_script(path).shots] == [1, 10]


def test_json_lines_of_longlive_give_ten_seconds_a_prompt(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompts": ["a", "b"]}\n\n{"prompts": ["c", "d", "e"], "switch_frame_indices": [40, 81]}\n')
    first, second = load_scripts(path)
    assert first == Script((Shot("a", 10), Shot("b", 10)))
    assert [shot.seconds for shot in second.shots] == [10, 10.25, 10]
    assert load_script(path, line=3) == second


def test_choosing_no_line_or_a_wrong_line_says_which_there_are(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompts": ["a"]}\n{"prompts": ["b"]}\n')
    with pytest.raises(InputError, match="holds 2 scripts; choose a line, 1 to 2"):
        load_script(path)
    with pytest.raises(InputError, match="no script on line 7; lines 1 to 2 have"):
        load_script(path, line=7)


def test_the_shipped_examples_are_read_and_last_a_minute():
    story = load_script(EXAMPLES / "lost-and-found.yaml")
    assert story.seconds == 60 and story.title and story.seed is not None
    assert story.schedule(LAYOUT).frames == 957
    for script in load_scripts(EXAMPLES / "six-prompts.jsonl"):
        assert len(script.shots) == 6 and script.seconds == 60


def test_the_hero_of_the_shipped_story_comes_late_and_is_away_for_longer_than_ten_seconds():
    schedule = load_script(EXAMPLES / "lost-and-found.yaml").schedule(LAYOUT)
    seen = ["red cat" in schedule.prompt_at(chunk) for chunk in range(schedule.chunks)]
    away = "".join("x" if here else "." for here in seen).strip(".")
    assert LAYOUT.chunk_start(seen.index(True)) > 3
    assert max(map(len, away.split("x"))) * 0.75 > 10


@given(st.data())
@FUZZ
def test_writing_a_script_as_yaml_and_reading_it_gives_it_back(data):
    words = st.text(min_size=1, max_size=60).filter(lambda text: _is_text(text))
    seconds = st.floats(0.001, 14, allow_nan=False)
    options = st.fixed_dictionaries(
        {}, optional={name: words if name in ("model", "memory") else st.integers(1, 9999) for name in OPTIONS}
    )
    script = Script(
        tuple(Shot(*pair) for pair in data.draw(st.lists(st.tuples(words, seconds), min_size=1, max_size=8))),
        seed=data.draw(st.none() | st.integers(0, 2**63 - 1)),
        title=data.draw(st.none() | words),
        options=data.draw(options),
    )
    assert parse_yaml(script.to_yaml()) == script


def _is_text(text: str) -> bool:
    try:
        Shot(text, 1)
        return True
    except InputError:
        return False


# schedule


def test_switches_wait_for_the_next_chunk_as_in_longlive():
    schedule = Script(tuple(Shot(f"{i}", 10) for i in range(6))).schedule(LAYOUT)
    assert [switch.requested_latent for switch in schedule.switches] == [40, 80, 120, 160, 200]
    assert [switch.applied_latent for switch in schedule.switches] == [42, 81, 120, 162, 201]
    assert (schedule.chunks, schedule.latents, schedule.frames) == (80, 240, 957)
    assert schedule.switches[0].applied_seconds == (4 * 41 + 1) / 16


def test_every_chunk_knows_its_shot():
    schedule = Script((Shot("a", 1), Shot("b", 2))).schedule(LAYOUT)
    assert schedule.shots == (0, 0, 1, 1)
    assert [schedule.shot_at(chunk) for chunk in range(4)] == [0, 0, 1, 1]
    assert [schedule.switched(chunk) for chunk in range(4)] == [False, False, True, False]
    assert schedule.prompt_at(3) == "b"


def test_a_shot_in_which_no_chunk_starts_is_refused():
    with pytest.raises(InputError, match=r"shots\[2\].seconds: 0.1 s is too short.*at least 0.75 s"):
        Script((Shot("a", 1), Shot("b", 0.1), Shot("c", 1))).schedule(LAYOUT)


@given(st.lists(st.floats(0.75, 40), min_size=1, max_size=12))
@FUZZ
def test_the_table_accounts_for_every_frame_and_no_switch_comes_early(seconds):
    script = Script(tuple(Shot(f"{i}", s) for i, s in enumerate(seconds)))
    schedule = script.schedule(LAYOUT)
    rows = schedule.rows()
    assert sum(row["frames"] for row in rows) == schedule.frames
    assert sum(row["chunks"] for row in rows) == schedule.chunks
    assert [row["first_chunk"] for row in rows] == [0] + [switch.chunk for switch in schedule.switches]
    for switch in schedule.switches:
        assert -1e-3 < switch.applied_latent - switch.requested_latent < 3
    assert schedule.latents % 3 == 0 and 0 <= schedule.latents - script.seconds * 4 + 1e-3 < 3.01


# complaints


SHOT = "- {prompt: a, seconds: 1}\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "a.yaml is empty; expected shots"),
        ("# nothing\n", "a.yaml is empty"),
        ("shots: []", "a.yaml:1: shots: no shots; expected at least one"),
        ("title: x\nshots:", "a.yaml:2: shots: expected a list of shots, each with prompt and seconds, got nothing"),
        ("seed: 1\n", "a.yaml:1: 'shots' is missing"),
        ("hello", "a.yaml:1: expected names with values (title, seed, options, shots), got 'hello'"),
        ("shot: 1", "unknown key 'shot'; did you mean 'shots'?"),
        (SHOT + "- prompt: b\n  secnds: 1", "a.yaml:3: shots[2]: unknown key 'secnds'; did you mean 'seconds'?"),
        (SHOT + "- prompt: b\n", "a.yaml:2: shots[2]: 'seconds' is missing; write for example seconds: 10"),
        ("- seconds: 3\n", "a.yaml:1: shots[1]: 'prompt' is missing"),
        ("- hello", "a.yaml:1: shots[1]: expected names with values (prompt, seconds), got 'hello'"),
        (SHOT + "- prompt: b\n  seconds: 0", "a.yaml:3: shots[2].seconds: expected more than 0 seconds, got 0"),
        ("- {prompt: a, seconds: -4}", "shots[1].seconds: expected more than 0 seconds, got -4"),
        ("- {prompt: a, seconds: .inf}", "expected at most 14400 seconds (4 hours), got inf"),
        ("- {prompt: a, seconds: inf}", "expected at most 14400 seconds (4 hours), got inf"),
        ("- {prompt: a, seconds: .nan}", "expected more than 0 seconds, got nan"),
        ("- {prompt: a, seconds: 1e9}", "expected at most 14400 seconds (4 hours), got 1000000000.0"),
        ("- {prompt: a, seconds: 10s}", "expected a number of seconds such as 10, got '10s'"),
        ("- {prompt: a, seconds: true}", "expected a number of seconds such as 10, got True"),
        ("- {prompt: a, seconds: [1]}", "shots[1].seconds: expected a single value, got a list of 1"),
        ("- {prompt: a, seconds: 2001-99-99}", "expected a number of seconds such as 10, got '2001-99-99'"),
        ("- {prompt: a, seconds: " + "9" * 6000 + "}", "expected a number of seconds such as 10, got '999"),
        ("- {prompt: a, seconds: " + "9" * 4000 + "}", "got a number of more than 60 digits"),
        ("- {prompt: a, seconds: 10000}\n" * 2, "20000 s in all; a script lasts at most 14400 s (4 hours)"),
        ("- {prompt: '', seconds: 1}", "shots[1].prompt: expected a prompt, got ''"),
        ("- {prompt: '  ', seconds: 1}", "shots[1].prompt: expected a prompt in words, got only white space"),
        ("- {prompt: yes, seconds: 1}", "got True; put it in quotes if that is the text"),
        ('- {prompt: "\\ud800", seconds: 1}', "shots[1].prompt: the character U+D800 is not text"),
        ('- {prompt: "a\\0", seconds: 1}', "shots[1].prompt: the character U+0000 is not text"),
        ('- {prompt: "\\UFFFFFFFF", seconds: 1}', "a.yaml:1: not valid YAML"),
        ("- prompt: a\n  prompt: b", "a.yaml:2: shots[1]: 'prompt' is given twice, first on line 1; keep one"),
        ("- &a {prompt: a, seconds: 1}\n- *a", "a.yaml:1: anchors and aliases ('&a') are not read; write it out"),
        ("[" * 100_000, "a.yaml:1: lists inside lists too deep"),
        ("- " * 100_000, "a.yaml:1: lists inside lists too deep"),
        ("shots: [", "a.yaml:1: not valid YAML"),
        ("--- a\n--- b", "a.yaml:2: not valid YAML"),
        ("shots:\n- \x07", "a.yaml:2: the character U+0007 is not allowed"),
        (SHOT * 10_000, "a.yaml:1001: more than 1000 shots"),
        ("options: {stpes: 1}\nshots:\n" + SHOT, "a.yaml:1: options: unknown option 'stpes'; did you mean 'steps'?"),
        ("options: {steps: 0}\nshots:\n" + SHOT, "options: steps: expected a whole number of at least 1, got 0"),
        ("options: {model: 3}\nshots:\n" + SHOT, "options: model: expected a name or a folder in words, got 3"),
        ("seed: -1\nshots:\n" + SHOT, "a.yaml:1: seed: expected a whole number from 0 to 2^63 - 1, got -1"),
        ("seed: x\nshots:\n" + SHOT, "seed: expected a whole number from 0 to 2^63 - 1, got 'x'"),
        ("title: [1]\nshots:\n" + SHOT, "a.yaml:1: title: expected a single value, got a list of 1"),
    ],
)
def test_bad_yaml_is_said_in_one_line(tmp_path, text, message):
    assert message in complaint(tmp_path / "a.yaml", text)


@pytest.mark.parametrize(
    "text, message",
    [
        ("\n \n", "a.jsonl is empty; expected one script per line"),
        ("{", "a.jsonl:1: not valid JSON"),
        ('{"prompts": ["a"]}\n[]', 'a.jsonl:2: expected {"prompts": [...]}, got list of 0'),
        ('{"prompts": "a"}', "a.jsonl:1: prompts: expected a list of texts, got a"),
        ("{}", "a.jsonl:1: prompts: expected a list of texts, got nothing"),
        ('{"prompts": []}', "a.jsonl:1: no shots"),
        ('{"prompts": ["a", 3]}', "a.jsonl:1: prompts[2]: expected a prompt in words, got 3"),
        ('{"promts": ["a"]}', "a.jsonl:1: unknown key 'promts'; did you mean 'prompts'?"),
        ('{"prompts": ["a"], "prompts": ["b"]}', "a.jsonl:1: 'prompts' is given twice; keep one"),
        ('{"prompts": ["a"], "seconds": 1e400}', "a.jsonl:1: seconds: expected at most 14400 seconds"),
        ('{"prompts": ["a"], "seconds": ' + "9" * 4000 + "}", "got a number of more than 60 digits"),
        ('{"prompts": ["a"], "seed": 1.5}', "a.jsonl:1: seed: expected a whole number"),
        ('{"prompts": ["a"], "options": []}', "a.jsonl:1: options: expected names with values"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": [0]}', "0 does not come after 0"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": []}', "0 switches for 2 prompts; expected 1"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": ["4"]}', "expected a list of latent frames"),
        ('{"prompts": ["a", "b"], "switch_frame_indices": [9999999]}', "beyond latent frame 57600, 4 hours"),
        ('{"prompts": [' + '"a",' * 1500 + '"b"]}', "1501 shots; a script has at most 1000"),
        ("[" * 100_000, "a.jsonl:1: not valid JSON"),
        ('{"prompts": ' + "9" * 5000 + "}", "a.jsonl:1: not valid JSON"),
        ('{"prompts": ["\\ud800"]}', "a.jsonl:1: prompts[1]: the character U+D800 is not text"),
    ],
)
def test_bad_json_lines_are_said_in_one_line(tmp_path, text, message):
    assert message in complaint(tmp_path / "a.jsonl", text)


def test_a_long_prompt_is_refused_with_the_limit(tmp_path):
    message = complaint(tmp_path / "a.yaml", "- seconds: 1\n  prompt: " + "a" * (MAX_PROMPT + 1))
    assert f"a.yaml:2: shots[1].prompt: {MAX_PROMPT + 1} characters; a prompt has at most {MAX_PROMPT}" in message
    Shot("a" * MAX_PROMPT, 1)


@pytest.mark.parametrize("suffix, limit", [(".yaml", "1 MB"), (".jsonl", "16 MB")])
def test_a_huge_file_is_refused_without_being_parsed(tmp_path, suffix, limit):
    # neither YAML nor JSON: whoever parsed it would say so
    message = complaint(tmp_path / f"a{suffix}", b"]: " + b"a" * (17 << 20))
    assert f"is larger than {limit}; a script has at most {MAX_SHOTS} shots, a prompt at most {MAX_PROMPT}" in message


def test_as_many_shots_as_the_limit_are_read():
    assert len(parse_yaml(SHOT * MAX_SHOTS).shots) == MAX_SHOTS


def test_files_that_are_not_scripts_are_said_in_one_line(tmp_path):
    assert "a.yaml is a binary file" in complaint(tmp_path / "a.yaml", b"\x89PNG\0\0")
    assert "a.mp4 is a binary file" in complaint(tmp_path / "a.mp4", b"\0\0\0\x18ftyp")
    assert "a.txt ends in '.txt'; expected a script that ends in .yaml" in complaint(tmp_path / "a.txt", "hello")
    message = complaint(tmp_path / "a.yaml", b"shots:\n- prompt: caf\xe9\n  seconds: 1\n")
    assert "a.yaml:2: expected text in UTF-8, got the byte 0xe9" in message
    for path, reason in [
        (tmp_path / "none.yaml", "no such file"),
        (tmp_path, "it is a folder"),
        (tmp_path / ("a" * 400), "the name is too long"),
        ("a\0b.yaml", "null byte"),
        ("/dev/zero", "is a binary file"),
    ]:
        with pytest.raises(InputError, match=reason):
            load_script(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_said_in_one_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(SHOT)
    path.chmod(0)
    with pytest.raises(InputError, match="permission denied"):
        load_script(path)


def test_shots_and_scripts_made_in_python_are_checked_alike():
    for make in (
        lambda: Shot("a", 0),
        lambda: Shot("a", "x"),
        lambda: Shot(3, 1),
        lambda: Script(()),
        lambda: Script(("a",)),
        lambda: Script((Shot("a", 1),), seed=-1),
        lambda: Script((Shot("a", 1),), options={"stpes": 1}),
        lambda: Script((Shot("a", 1),), options=3),
    ):
        with pytest.raises(InputError):
            make()


# fuzz: whatever is read, only InputError comes out, and it is one line


def only_input_errors(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        for script in load_scripts(path):
            assert parse_yaml(script.to_yaml()) == script
            script.schedule(LAYOUT)
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 600


SUFFIXES = st.sampled_from(["a.yaml", "a.jsonl"])


@given(SUFFIXES, st.binary(max_size=300))
@FUZZ
def test_random_bytes_raise_nothing_but_input_errors(tmp_path, name, content):
    only_input_errors(tmp_path / name, content)


YAML_PIECES = st.sampled_from(
    "- |: |, |[|]|{|}|&a |*a |<<: *a|!!python/object:os.system |!!binary |!!float |!!set |? |\n|\n  |  |\t|'|\"|# |"
    "---|...|%YAML 1.1|shots|prompt|seconds|title|seed|options|steps|> |\\x|\\ud800|.inf|.nan|0x|0b|1_0|1:30|"
    "2001-99-99|~|=|null|\ufeff|\u2028|\x85|é".split("|")
)


@given(SUFFIXES, st.lists(YAML_PIECES | st.text(max_size=4), max_size=40).map("".join))
@FUZZ
def test_random_text_raises_nothing_but_input_errors(tmp_path, name, content):
    only_input_errors(tmp_path / name, content.encode("utf-8", "surrogatepass"))


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20)
    | st.dates()
    | st.binary(max_size=8)
    | st.sampled_from([10**400, -1, 1e9, "1e9", 5])
)
KEYS = st.sampled_from(["title", "seed", "options", "shots", "prompt", "seconds", "steps", "prompts"]) | SCALARS
SHOT_LIKE = st.fixed_dictionaries({"prompt": st.text(max_size=9) | SCALARS, "seconds": st.floats(0.1, 9) | SCALARS})
TREES = st.recursive(
    SCALARS | SHOT_LIKE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
SCRIPT_LIKE = st.fixed_dictionaries(
    {"shots": st.lists(SHOT_LIKE, max_size=4) | TREES}, optional={"title": SCALARS, "seed": SCALARS, "options": TREES}
)


@given(TREES | SCRIPT_LIKE | st.lists(SHOT_LIKE, max_size=4), st.booleans())
@FUZZ
def test_random_yaml_trees_raise_nothing_but_input_errors(tmp_path, tree, flow):
    content = yaml.dump(tree, default_flow_style=flow, allow_unicode=True)
    only_input_errors(tmp_path / "a.yaml", content.encode("utf-8", "surrogatepass"))


LINE_LIKE = st.fixed_dictionaries(
    {"prompts": st.lists(st.text(max_size=9) | st.integers(), max_size=4)},
    optional={
        "switch_frame_indices": st.lists(st.integers(-2, 99), max_size=3),
        "seconds": st.floats() | st.just(10**400),
        "seed": st.integers(),
        "title": st.text(),
        "options": st.dictionaries(st.sampled_from([*OPTIONS, "x"]), st.integers() | st.text(), max_size=3),
    },
)
JSON_TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.lists(LINE_LIKE | JSON_TREES, max_size=3))
@FUZZ
def test_random_json_trees_raise_nothing_but_input_errors(tmp_path, trees):
    only_input_errors(tmp_path / "a.jsonl", "\n".join(json.dumps(tree) for tree in trees).encode())
