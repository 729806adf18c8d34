"""The run folder: everything that one session produced, each file whole at every moment.

    script.yaml        what was asked for, shots and seconds
    recipe.yaml        how: model, memory and its arguments, budget, seed, version, git commit
    video.mp4          playable while it grows
    trace.jsonl        one record per chunk
    state.safetensors  the session after some chunk, to go on from
    status.json        running, stopped, failed or finished, and how far
    filmstrip.png, timeline.png

It knows files, not sessions: what a state holds is the session's business.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import yaml

from . import __version__
from .errors import InputError, shorten
from .script import Script, load_script
from .tree import atomic_file, tree_from_file, tree_to_file
from .video import VideoWriter

STATUSES = ("running", "stopped", "failed", "finished")
_RECIPE_BYTES = 1 << 20


class Run:
    """One run folder. Use `Run.create` or `Run.open`; after `open`, `rewind` goes back to the saved state."""

    def __init__(self, folder: Path, script: Script, recipe: Mapping[str, Any], status: Mapping[str, Any]) -> None:
        self.folder = folder
        self.script = script
        self.recipe = dict(recipe)
        self.status = dict(status)
        self._trace: BinaryIO | None = None
        self._writer: VideoWriter | None = None

    @property
    def video(self) -> Path:
        return self.folder / "video.mp4"

    @property
    def trace(self) -> Path:
        return self.folder / "trace.jsonl"

    @property
    def state(self) -> Path:
        return self.folder / "state.safetensors"

    @property
    def filmstrip(self) -> Path:
        return self.folder / "filmstrip.png"

    @property
    def timeline(self) -> Path:
        return self.folder / "timeline.png"

    # start and open

    @classmethod
    def create(cls, folder: str | Path, script: Script, recipe: Mapping[str, Any]) -> Run:
        """Start a run in a new or empty folder; `recipe` gets the version and, where known, the git commit."""
        folder = Path(folder)
        recipe = {**recipe, "version": __version__, "commit": git_commit()}
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            taken = any(folder.iterdir())
        except FileExistsError as error:
            raise InputError(f"{_name(folder)} is a file, not a folder; choose another --out") from error
        except OSError as error:
            raise InputError.from_os("make the run folder", folder, error) from error
        if taken:
            if (folder / "recipe.yaml").exists():
                advice = f"continue it with `slotmemory resume {folder}` or choose another --out"
                raise InputError(f"{_name(folder)} already holds a run; {advice}")
            raise InputError(f"{_name(folder)} exists and is not empty; choose another --out")
        run = cls(folder, script, recipe, {})
        with atomic_file(folder / "script.yaml") as file:
            file.write(script.to_yaml().encode())
        with atomic_file(folder / "recipe.yaml") as file:
            file.write(text.encode())
        run.set_status("running", 0)
        return run

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open a run to read it or to go on; nothing in the folder is changed."""
        folder = Path(folder)
        if not folder.is_dir():
            what = "is a file, not a folder" if folder.exists() else "does not exist"
            raise InputError(f"{_name(folder)} {what}; expected a run folder, such as those in runs/")
        for name in ("script.yaml", "recipe.yaml"):
            if not (folder / name).is_file():
                raise InputError(f"{_name(folder)} is not a run folder, {name} is missing; start a new run")
        return cls(folder, load_script(folder / "script.yaml"), _read_recipe(folder), _read_status(folder))

    # trace

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one chunk's record to trace.jsonl; numbers that are not finite become null."""
        line = json.dumps(finite(record), separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
        try:
            if self._trace is None:
                self._trace = open(self.trace, "ab", buffering=0)
            start = self._trace.seek(0, os.SEEK_END)
            if self._trace.write(line) != len(line):
                self._trace.truncate(start)
                raise InputError(f"cannot write {_name(self.trace)}: the disk is full; free some space")
        except OSError as error:
            raise InputError.from_os("write", self.trace, error) from error

    def records(self) -> list[dict[str, Any]]:
        """Records of all whole chunks; a last line that breaks off is left out."""
        return [record for record, _ in self._lines()]

    def _lines(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Records and the file position after each."""
        if self._trace is None and not self.trace.exists():
            return
        try:
            data = self.trace.read_bytes()
        except OSError as error:
            raise InputError.from_os("read", self.trace, error) from error
        start = 0
        for number, line in enumerate(data.split(b"\n")[:-1], 1):
            start += len(line) + 1
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("not a record")
            except (ValueError, RecursionError) as error:
                if start == len(data):
                    return  # a power cut can leave a last line of zeros
                raise InputError(f"{_name(self.trace)}:{number}: damaged, expected one JSON record per line") from error
            yield record, start

    # video

    def open_video(self, fps: int, width: int, height: int, scale: int = 1) -> VideoWriter:
        """Open video.mp4 to append chunks, after as many as the trace has; the caller writes and closes it."""
        self._writer = VideoWriter(self.video, fps, width, height, scale, keep=len(self.records()))
        return self._writer

    # state

    def save_state(self, tree: Any, chunks: int) -> None:
        """Save a session after `chunks` chunks, whose frames and records must have been written before."""
        if self._writer is not None:
            self._writer.sync()
        if self._trace is not None:
            try:
                os.fsync(self._trace.fileno())
            except OSError as error:
                raise InputError.from_os("write", self.trace, error) from error
        tree_to_file({"chunks": chunks, "state": tree}, self.state)
        self.set_status(self.status.get("status", "running"), chunks, **_rest(self.status))

    def load_state(self) -> Any:
        """The tree given to `save_state`. Raises InputError if there is none or it is damaged."""
        return self._load()["state"]

    @property
    def saved_chunks(self) -> int:
        """Chunks in the saved state, 0 if none was saved."""
        return self._load()["chunks"] if self.state.exists() else 0

    def _load(self) -> dict[str, Any]:
        if not self.state.exists():
            raise InputError(f"{_name(self.folder)} has no saved state yet; start a new run, `--like` repeats this one")
        saved = tree_from_file(self.state)
        if not isinstance(saved, dict) or type(saved.get("chunks")) is not int or "state" not in saved:
            raise InputError(f"{_name(self.state)} is not the state of a run")
        return saved

    def rewind(self) -> int:
        """Cut trace and status back to the saved state and return its number of chunks, 0 to start over.

        The video is cut by `open_video`, which is told by the trace."""
        chunks = self.saved_chunks
        ends = [0, *(end for _, end in self._lines())]
        if len(ends) - 1 < chunks:
            raise InputError(
                f"{_name(self.trace)} has {len(ends) - 1} whole records, {chunks} are needed to go on from the saved "
                "state; start a new run"
            )
        self.close()
        try:
            with open(self.trace, "ab") as file:
                file.truncate(ends[chunks])
        except OSError as error:
            raise InputError.from_os("write", self.trace, error) from error
        self.set_status("running", chunks, **_rest(self.status))
        return chunks

    # status

    def set_status(self, status: str, chunks: int, **more: Any) -> None:
        """Write status.json: one of STATUSES, the chunks made, and plain values such as total or message."""
        assert status in STATUSES, status
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.status = {"status": status, "chunks": chunks, "updated": now, **finite(more)}
        with atomic_file(self.folder / "status.json") as file:
            file.write(json.dumps(self.status, indent=2).encode() + b"\n")

    def close(self) -> None:
        """Close what is open; the folder stays valid without it."""
        if self._trace is not None:
            self._trace.close()
            self._trace = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def new_folder(root: str | Path = "runs", title: str | None = None) -> Path:
    """A folder name that is still free, from the time and a title: runs/2026-01-31-094501-lost-and-found."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    words = re.sub(r"[^a-z0-9]+", "-", (title or "").lower()).strip("-")[:40].rstrip("-")
    base = f"{stamp}-{words}" if words else stamp
    candidates = (Path(root) / (base if number == 1 else f"{base}-{number}") for number in range(1, 1000))
    return next(path for path in candidates if not path.exists())


def git_commit() -> str | None:
    """The commit of this package's source, ending in -dirty if it was changed since; None outside a checkout."""
    folder = Path(__file__).parent

    def ask(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        if not ask("ls-files", "__init__.py"):
            return None  # installed somewhere inside another repository
        return ask("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _name(path: Path) -> str:
    return shorten(path, 200)


def _rest(status: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in status.items() if key not in ("status", "chunks", "updated", "message")}


def _read_recipe(folder: Path) -> dict[str, Any]:
    path = folder / "recipe.yaml"
    try:
        with open(path, "rb") as file:
            data = file.read(_RECIPE_BYTES + 1)
        recipe = yaml.safe_load(data.decode()) if len(data) <= _RECIPE_BYTES else None
    except OSError as error:
        raise InputError.from_os("read", path, error) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{_name(path)} is damaged: {shorten(str(error), 80)}") from error
    if not isinstance(recipe, dict):
        raise InputError(f"{_name(path)} is damaged: expected names with values")
    return recipe


def _read_status(folder: Path) -> dict[str, Any]:
    """What status.json says; a run without a readable one was interrupted at birth."""
    try:
        status = json.loads((folder / "status.json").read_bytes())
    except (OSError, ValueError):
        status = None
    if not isinstance(status, dict) or status.get("status") not in STATUSES:
        return {"status": "stopped", "chunks": 0}
    return status


def finite(value: Any) -> Any:
    """A copy that JSON can hold: numbers that are not finite become null, keys text and tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value
