"""The comparison of streams at its smallest: measured once, kept, reported side by side."""

import json

import pytest
from benchmarks import streams_compared
from PIL import Image

from tests.models_for_tests import write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("streams")
    write_model(path / "one")
    write_model(path / "two", seed=1)
    return path


@pytest.fixture
def call(folder, monkeypatch, capsys):
    """Run the benchmark: call(words...) -> status, what was said; `call.made` lists what was streamed."""
    made, stream = [], streams_compared.streamed

    def counted(engine, *given):
        made.append(engine.memory.called())
        return stream(engine, *given)

    monkeypatch.setattr(streams_compared, "streamed", counted)

    def run(*words):
        fixed = ["--scripts", "1", "--seconds", "3", "--moments", "4", "--out", str(folder / "out")]
        status = streams_compared.main([*fixed, *words])
        return status, "".join(capsys.readouterr())

    run.made = made
    return run


def test_models_are_streamed_once_and_stand_side_by_side(call, folder):
    words = ["--models", f"{folder / 'one'},{folder / 'two'}@none", "--names", "before,after", "--reference"]
    status, said = call(*words)
    assert status == 0, said
    assert call.made == ["sink", "none"]
    for title in ("| before |", "| after |", "| rendered |", "## Minus `before`", "frames/s"):
        assert title in said
    numbers = json.loads((folder / "out" / "report.json").read_text())
    assert numbers["means"]["before"]["speed"]["mean"] > 0 and numbers["means"]["rendered"]["speed"]["mean"] is None
    means, minus = numbers["means"], numbers["minus_before"]["after"]
    for name in ("distance.first", "sharpness.last", "amount"):
        assert minus[name]["mean"] == pytest.approx(means["after"][name]["mean"] - means["before"][name]["mean"])
    assert set(numbers["minus_before"]) == {"after"}
    picture = Image.open(folder / "out" / "filmstrip.png")
    assert picture.width > 4 * 240 and picture.height > 3 * 160

    assert call(*words)[0] == 0 and call.made == ["sink", "none"]
    write_model(folder / "two", seed=2)
    assert call(*words)[0] == 0 and call.made == ["sink", "none", "none"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--models", "tiny", "--names", "a,b"], "1 models and 2 names"),
        (["--models", "tiny,tiny"], "two are the same"),
        (["--models", "no-such-model"], "no-such-model"),
        (["--models", "tiny", "--scripts", "0"], "--scripts 0 --moments 4; expected at least one of each"),
    ],
)
def test_mistakes_are_named_in_one_line(call, words, said):
    status, told = call(*words)
    assert status == 2 and said in told and told.count("\n") == 1


def test_results_of_other_settings_are_not_mixed(call, folder):
    words = ["--models", str(folder / "one"), "--names", "one", "--out", str(folder / "mixed")]
    assert call(*words)[0] == 0
    status, said = call(*words, "--seconds", "2")
    assert status == 2 and "use another --out" in said
