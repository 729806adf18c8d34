"""The command line called in this process, on a model of a few kilobytes."""

import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from slotmemory.cli import main
from tests.models_for_tests import write_model

SCRIPT = """\
title: Two shots
seed: 3
shots:
  - {prompt: A red cat walks in the meadow., seconds: 2}
  - {prompt: A blue ghost jumps in the snow., seconds: 1.75}
"""
CHUNKS, FRAMES = 5, 57  # 3.75 s are 15 latent frames


class Result(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture
def script(tmp_path) -> Path:
    path = tmp_path / "script.yaml"
    path.write_text(SCRIPT)
    return path


@pytest.fixture
def slotmemory(capfd, tmp_path, monkeypatch):
    """Call a command in an empty working directory: slotmemory("generate", ...) -> status, out, err."""
    monkeypatch.chdir(tmp_path)
    # whoever starts the tests in the background may have told them to ignore Ctrl-C
    ctrl_c = signal.signal(signal.SIGINT, signal.default_int_handler)

    def call(*words) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(word) for word in words])
        return Result(exit.value.code, *capfd.readouterr())

    yield call
    signal.signal(signal.SIGINT, ctrl_c)


@pytest.fixture(scope="session")
def whole(model, tmp_path_factory) -> Path:
    """A run of SCRIPT that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "script.yaml").write_text(SCRIPT)
    with pytest.raises(SystemExit) as exit:
        main(words_of(folder / "script.yaml", model, folder / "run"))
    assert exit.value.code == 0
    return folder / "run"


def words_of(script: Path, model: Path, out: Path, *more) -> list[str]:
    """The command line all tests share; saves after every second chunk."""
    words = ["generate", script, "--model", model, "--out", out, "--scale", "2", "--save-every", "2", "--threads", "1"]
    return [str(word) for word in (*words, *more)]
