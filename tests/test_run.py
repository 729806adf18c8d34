"""The run folder: whole at every moment, cut back to its last state, one line for whatever is wrong with it."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from slotmemory.errors import InputError
from slotmemory.run import Run, git_commit, new_folder
from slotmemory.script import Script, Shot
from slotmemory.tree import atomic_file, tree_from_file, tree_to_file
from slotmemory.video import count_chunks
from tests.disk import file_size_limit

SCRIPT = Script((Shot("A red cat walks in the meadow.", 4), Shot("A ghost.", 3.5)), seed=3, title="Lost")
RECIPE = {"model": "tiny", "memory": {"name": "slots", "slots": 7}, "budget": 640, "seed": 3}


def frames(chunk: int) -> torch.Tensor:
    return torch.full((9 if chunk == 0 else 12, 3, 48, 80), 10 * chunk, dtype=torch.uint8)


def go(run: Run, chunks: range, save_at: int | None = None) -> None:
    """Write some chunks as a session would."""
    with run, run.open_video(16, 80, 48) as video:
        for chunk in chunks:
            video.write(frames(chunk))
            run.append({"chunk": chunk, "score": float(chunk)})
            if chunk + 1 == save_at:
                run.save_state({"latents": torch.full((2, 2), float(chunk))}, chunk + 1)


# create and open


def test_a_run_is_opened_as_it_was_made(tmp_path):
    run = Run.create(tmp_path / "deep" / "run", SCRIPT, RECIPE)
    found = Run.open(run.folder)
    assert found.script == SCRIPT
    assert {key: found.recipe[key] for key in RECIPE} == RECIPE
    assert found.recipe == run.recipe and found.recipe["version"]
    assert found.status["status"] == "running" and found.saved_chunks == 0 and found.records() == []


def test_the_recipe_knows_the_commit_of_a_checkout():
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("-dirty")) == 40


def test_an_empty_folder_is_used_and_a_full_one_refused(tmp_path):
    Run.create(tmp_path, SCRIPT, RECIPE)
    with pytest.raises(InputError, match=f"holds a run; continue it with `slotmemory resume {tmp_path}` or choose"):
        Run.create(tmp_path, SCRIPT, RECIPE)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(InputError, match="other exists and is not empty; choose another --out"):
        Run.create(tmp_path / "other", SCRIPT, RECIPE)
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]


def test_places_where_no_folder_can_be_made_are_said_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder, reason in [
        (tmp_path / "file", "is a file, not a folder; choose another --out"),
        (tmp_path / "file" / "run", "a part of the path is a file, not a folder"),
        (tmp_path / ("x" * 300), "the name is too long"),
        ("/proc/run", "cannot make the run folder /proc/run"),
    ]:
        with pytest.raises(InputError, match=reason):
            Run.create(folder, SCRIPT, RECIPE)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_said_in_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="permission denied"):
        Run.create(tmp_path / "run", SCRIPT, RECIPE)


def test_new_folders_are_named_by_time_and_title_and_are_free(tmp_path):
    first = new_folder(tmp_path, "Lost & found, 2!")
    assert first.name.endswith("-lost-found-2") and first.parent == tmp_path
    first.mkdir()
    assert not new_folder(tmp_path, "Lost & found, 2!").exists()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("script.yaml", None, "is not a run folder, script.yaml is missing"),
        ("recipe.yaml", None, "is not a run folder, recipe.yaml is missing"),
        ("script.yaml", b"shots: [", "script.yaml:1: not valid YAML"),
        ("recipe.yaml", b"\xff", "recipe.yaml is damaged"),
        ("recipe.yaml", b"a: [", "recipe.yaml is damaged"),
        ("recipe.yaml", b"", "recipe.yaml is damaged: expected names with values"),
        ("recipe.yaml", b"[" * 600, "recipe.yaml is damaged"),
    ],
)
def test_a_folder_with_missing_or_damaged_parts_is_refused(tmp_path, name, content, message):
    run = Run.create(tmp_path / "run", SCRIPT, RECIPE)
    if content is None:
        (run.folder / name).unlink()
    else:
        (run.folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        Run.open(run.folder)
    assert "\n" not in str(caught.value)


def test_what_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="does not exist; expected a run folder"):
        Run.open(tmp_path / "none")
    with pytest.raises(InputError, match="is a file, not a folder"):
        Run.open(tmp_path / "file")


def test_a_run_without_a_readable_status_counts_as_stopped(tmp_path):
    run = Run.create(tmp_path / "run", SCRIPT, RECIPE)
    (run.folder / "status.json").write_text("{")
    assert Run.open(run.folder).status["status"] == "stopped"


# trace


def test_records_come_back_and_numbers_without_end_become_null(tmp_path):
    run = Run.create(tmp_path / "run", SCRIPT, RECIPE)
    run.append({"chunk": 0, "prompt": "caf\xe9\u2028\n", "items": [{"score": float("inf"), "born": 3}]})
    run.append({"chunk": 1})
    expected = [{"chunk": 0, "prompt": "caf\xe9\u2028\n", "items": [{"score": None, "born": 3}]}, {"chunk": 1}]
    assert run.records() == expected
    run.close()
    assert Run.open(run.folder).records() == expected


@pytest.mark.parametrize("torn", [b'{"chunk": 2', b'{"chunk"\n', b"\0\0\0\0\n", b"\0\0"])
def test_a_last_record_that_breaks_off_is_left_out(tmp_path, torn):
    run = Run.create(tmp_path / "run", SCRIPT, RECIPE)
    go(run, range(2))
    with open(run.trace, "ab") as file:
        file.write(torn)
    assert [record["chunk"] for record in Run.open(run.folder).records()] == [0, 1]


def test_a_damaged_record_in_the_middle_is_named(tmp_path):
    run = Run.create(tmp_path / "run", SCRIPT, RECIPE)
    run.trace.write_bytes(b'{"chunk": 0}\nhello\n{"chunk": 2}\n')
    with pytest.raises(InputError, match="trace.jsonl:2: damaged"):
        Run.open(run.folder).records()


# resume


@pytest.mark.parametrize("torn", [b"", b'{"chunk": 5'])
def test_a_resumed_run_ends_with_the_files_of_an_uninterrupted_one(tmp_path, torn):
    whole = Run.create(tmp_path / "whole", SCRIPT, RECIPE)
    go(whole, range(6), save_at=3)
    broken = Run.create(tmp_path / "broken", SCRIPT, RECIPE)
    go(broken, range(5), save_at=3)
    with open(broken.trace, "ab") as file:
        file.write(torn)
    again = Run.open(broken.folder)
    assert again.saved_chunks == 3
    assert again.rewind() == 3
    assert len(again.records()) == 3
    assert again.load_state()["latents"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    go(again, range(3, 6))
    assert again.video.read_bytes() == whole.video.read_bytes()
    assert again.trace.read_bytes() == whole.trace.read_bytes()


def test_a_run_without_a_saved_state_starts_over(tmp_path):
    run = Run.create(tmp_path / "run", SCRIPT, RECIPE)
    go(run, range(2))
    again = Run.open(run.folder)
    with pytest.raises(InputError, match="has no saved state yet"):
        again.load_state()
    assert again.rewind() == 0
    go(again, range(3))
    assert count_chunks(again.video) == (3, 33) and len(again.records()) == 3


def test_a_trace_shorter_than_the_state_is_refused(tmp_path):
    run = Run.create(tmp_path / "run", SCRIPT, RECIPE)
    go(run, range(3), save_at=3)
    run.trace.write_bytes(b'{"chunk": 0}\n')
    with pytest.raises(InputError, match="1 whole records, 3 are needed"):
        Run.open(run.folder).rewind()


def test_a_video_shorter_than_the_state_is_refused(tmp_path):
    run = Run.create(tmp_path / "run", SCRIPT, RECIPE)
    go(run, range(3), save_at=3)
    run.video.write_bytes(run.video.read_bytes()[:-50])
    again = Run.open(run.folder)
    again.rewind()
    with pytest.raises(InputError, match="holds 2 whole chunks, 3 are needed"):
        again.open_video(16, 80, 48)


def test_a_status_is_kept_through_saves(tmp_path):
    run = Run.create(tmp_path / "run", SCRIPT, RECIPE)
    run.set_status("running", 0, total=10)
    run.save_state({}, 4)
    status = json.loads((run.folder / "status.json").read_text())
    assert (status["status"], status["chunks"], status["total"]) == ("running", 4, 10)
    run.set_status("failed", 4, message="the disk is full")
    assert Run.open(run.folder).status["message"] == "the disk is full"


def test_a_killed_run_can_be_opened_and_gone_on_with(tmp_path):
    code = (
        "import sys, torch\nfrom slotmemory.run import Run\nfrom slotmemory.script import Script, Shot\n"
        "run = Run.create(sys.argv[1], Script((Shot('a', 60),)), {})\n"
        "video = run.open_video(16, 80, 48)\n"
        "for k in range(1000):\n"
        "    video.write(torch.zeros(12, 3, 48, 80, dtype=torch.uint8))\n"
        "    run.append({'chunk': k})\n"
        "    run.save_state({'k': k, 'big': torch.zeros(300_000)}, k + 1)\n"
        "    print(k, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        for line in process.stdout:
            if int(line) == 8:
                break
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    run = Run.open(tmp_path / "run")
    chunks = run.rewind()
    assert chunks >= 9 and run.load_state()["k"] == chunks - 1
    with run.open_video(16, 80, 48) as video:
        assert video.chunks == chunks == len(run.records())


# full disks


def test_a_full_disk_leaves_the_state_before_intact(tmp_path):
    run = Run.create(tmp_path / "run", SCRIPT, RECIPE)
    run.save_state({"x": torch.arange(10)}, 1)
    before = run.state.read_bytes()
    with file_size_limit(100_000):
        with pytest.raises(InputError, match="cannot write .*state.safetensors: .*free some space") as caught:
            run.save_state({"x": torch.zeros(1_000_000)}, 2)
    assert "\n" not in str(caught.value)
    assert run.state.read_bytes() == before
    assert Run.open(run.folder).saved_chunks == 1
    assert not [name for name in os.listdir(run.folder) if name.endswith(".part")]


def test_a_full_disk_leaves_the_trace_whole(tmp_path):
    run = Run.create(tmp_path / "run", SCRIPT, RECIPE)
    run.append({"chunk": 0})
    with file_size_limit(run.trace.stat().st_size + 5):
        with pytest.raises(InputError, match="cannot write .*trace.jsonl: .*free some space"):
            run.append({"chunk": 1, "prompt": "x" * 100})
    run.append({"chunk": 1})
    assert [record["chunk"] for record in run.records()] == [0, 1]


def test_an_interrupt_while_writing_keeps_the_old_file(tmp_path):
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_file(tmp_path / "a") as file:
            file.write(b"new")
            raise KeyboardInterrupt
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


# trees


DTYPES = st.sampled_from(
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16]
    + [torch.int8, torch.uint8, torch.bool]
)


@st.composite
def tensors(draw) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=4))
    dtype = draw(DTYPES)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        bits = bits % 2
    tensor = bits.view(dtype).squeeze(-1)  # any bits, nan among them
    if len(shape) >= 2 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)
    return tensor


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()))
TREES = st.recursive(
    PLAIN | tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=4) | st.integers() | st.tuples(st.integers()), inner, max_size=4)
    ),
    max_leaves=12,
)


def same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        bits = [t.contiguous().reshape(-1).view(torch.uint8).tolist() for t in (a, b)]
        return a.dtype == b.dtype and a.shape == b.shape and bits[0] == bits[1]
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float):
        return a.hex() == b.hex()
    return a == b


@given(TREES)
@settings(derandomize=True, max_examples=80, deadline=None)
def test_any_tree_comes_back_exactly(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "t.safetensors"
    tree_to_file(tree, path)
    assert same(tree, tree_from_file(path))


def test_a_generator_goes_on_exactly_after_a_round_trip(tmp_path):
    generator = torch.Generator().manual_seed(5)
    torch.randn(7, generator=generator)
    tree_to_file({"random": generator.get_state(), "huge": 10**6000}, tmp_path / "t")
    expected = torch.randn(9, generator=generator)
    tree = tree_from_file(tmp_path / "t")
    generator.set_state(tree["random"])
    assert torch.equal(torch.randn(9, generator=generator), expected) and tree["huge"] == 10**6000


def test_views_that_share_memory_come_back_as_tensors_of_their_own(tmp_path):
    base = torch.arange(6.0).requires_grad_()
    tree_to_file([base, base[2:4], base.view(2, 3).T, base], tmp_path / "t")
    tree = tree_from_file(tmp_path / "t")
    tree[0][2] = 100
    assert tree[1].tolist() == [2, 3] and tree[2].tolist() == [[0, 3], [1, 4], [2, 5]] and tree[3][2] == 2


def test_what_is_no_plain_tree_is_named():
    class Thing:
        pass

    for tree, message in [
        ({"a": [1, Thing()]}, r"tree\['a'\]\[1\] is a Thing"),
        ([torch.zeros(2, dtype=torch.complex64)], r"tree\[0\] is a tensor of torch.complex64"),
        (torch.zeros(2, 2).to_sparse(), "tree is a tensor of torch.float32, torch.sparse_coo"),
        ({1, 2}, "tree is a set"),
    ]:
        with pytest.raises(TypeError, match=message):
            tree_to_file(tree, "/nowhere/t")


def test_a_damaged_state_file_is_said_in_one_line(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "state.safetensors"
    tree_to_file({"a": torch.arange(100), "b": [1.5, None]}, path)
    whole = path.read_bytes()
    for cut in (0, 4, 8, 60, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(InputError, match="state.safetensors is truncated or damaged"):
            tree_from_file(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(InputError, match="is not a saved state"):
        tree_from_file(path)
    with pytest.raises(InputError, match="no such file"):
        tree_from_file(tmp_path / "none")
    with pytest.raises(InputError, match="it is a folder"):
        tree_from_file(tmp_path)


@given(st.data())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_a_flipped_byte_never_raises_anything_but_input_errors(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "t.safetensors"
    tree_to_file({"a": torch.arange(4), "b": [1.5, (None, "x")]}, path)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        tree_from_file(path)
    except InputError as error:
        assert "\n" not in str(error)


def test_a_state_is_an_ordinary_safetensors_file(tmp_path):
    from safetensors.torch import load_file

    tree_to_file({"a": torch.arange(3)}, tmp_path / "t.safetensors")
    assert load_file(tmp_path / "t.safetensors")["0"].tolist() == [0, 1, 2]


def test_the_files_of_a_run_are_readable_by_people(tmp_path):
    run = Run.create(tmp_path / "run", SCRIPT, RECIPE)
    assert yaml.safe_load((run.folder / "script.yaml").read_text())["title"] == "Lost"
    assert yaml.safe_load((run.folder / "recipe.yaml").read_text())["memory"] == {"name": "slots", "slots": 7}
