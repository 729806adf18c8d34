"""The pages of docs/ do what they say: their files are written, their code runs, their commands succeed."""

import re
import shlex
from pathlib import Path

import pytest

from slotmemory.cli import main
from tests.models_for_tests import write_model

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w+)(?: ([\w.]+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# what a page shows is made smaller here: the last of two options counts
SMALLER = {
    "generate": ["--seconds", "2", "--threads", "1", "--scale", "2"],
    "bench": ["--seconds", "4", "--chunks", "1", "--threads", "1"],
}


def blocks(page: str) -> list[tuple[str, str, str]]:
    """Language, file name and content of every fenced block."""
    return BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "micro")


def run(command: str, model: Path) -> int:
    words = shlex.split(command)
    assert words[0] == "slotmemory"
    if words[1] in SMALLER:
        words += ["--model", str(model), *SMALLER[words[1]]]
    with pytest.raises(SystemExit) as exit:
        main(words[1:])
    return exit.value.code


def test_the_page_on_writing_a_memory_does_what_it_says(tmp_path, monkeypatch, model, capsys):
    monkeypatch.chdir(tmp_path)
    commands = []
    for language, name, content in blocks("write-a-memory.md"):
        if name:
            (tmp_path / name).write_text(content)
        elif language == "python":
            exec(compile(content, "write-a-memory.md", "exec"), {})
        else:
            assert language == "sh"
            commands += content.splitlines()
    for command in commands:
        assert run(command, model) == 0, (command, capsys.readouterr().err)
    assert [words.split()[1] for words in commands] == ["memories", "generate", "bench"]
    out = capsys.readouterr().out
    assert "memory 'landmarks' keeps the contract" in out
    assert (tmp_path / "runs" / "landmarks" / "video.mp4").stat().st_size
    assert "landmarks.py,448," in (tmp_path / "runs" / "landmarks-bench" / "bench.csv").read_text()


def test_the_memory_of_the_page_takes_less_than_60_lines():
    ((_, _, content),) = [block for block in blocks("write-a-memory.md") if block[1]]
    assert len(content.splitlines()) < 60
