"""Models by name, as data: which files, and the settings they were trained for.

A preset is a YAML file of the package (assets/presets); a person's own file of the same form works too, `like: longlive`
taking over what it does not say. It knows addresses, not files (`sources.py`).
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slotmemory.errors import InputError, shorten, unknown


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class AdapterAt(Frozen):
    """An adapter: where it is, how strongly it acts, and whether it is merged into the weights or stays switchable."""

    file: str
    scale: float = 1.0
    merge: bool = True


class Preset(Frozen):
    """A model. Files are addresses: a path, or a file on the Hub such as org/name/path/file.pt@revision."""

    about: str = ""
    transformer: str | None = None
    part: str | None = None  # of a training checkpoint: generator, generator_ema
    lora: list[AdapterAt] = []
    codec: str | None = None
    text: str | None = None
    tokenizer: str | None = None
    size: Literal["1.3B", "14B"] | None = None
    licence: str = ""
    height: int = Field(480, ge=16)
    width: int = Field(832, ge=16)
    fps: int = Field(16, ge=1)
    frames_per_chunk: int = Field(3, ge=1)
    shift: float = Field(5.0, gt=0)
    steps: int | list[int] = [1000, 750, 500, 250]  # a number: so many Euler steps
    context_noise: float = Field(0.0, ge=0, lt=1)
    guidance: float = Field(1.0, ge=1)  # 1: none, as distilled models need none
    negative: str = ""  # the prompt that guidance leads away from
    memory: dict[str, Any] = {}

    def settings(self) -> dict[str, Any]:
        """What an engine is assembled with, beside the files."""
        names = ("height", "width", "fps", "frames_per_chunk", "shift", "steps", "context_noise", "memory")
        names += ("guidance", "negative") if self.guidance > 1 else ()
        return {name: getattr(self, name) for name in names} | {"any_size": True}


def _folder() -> Path:
    return Path(str(files("slotmemory") / "assets" / "presets"))


def names() -> list[str]:
    """Names of the presets in the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def find(name: str) -> Preset:
    """A preset of the package by name."""
    if name not in names():
        raise InputError(unknown("preset", name, names()))
    return read(_folder() / f"{name}.yaml")


def read(path: Path) -> Preset:
    """Read a preset file; relative paths in it are counted from its folder."""
    values = _values(path, [])
    try:
        return Preset.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"{path}: {place}: {first['msg']}, got {shorten(first['input'])}") from None


def _values(path: Path, seen: list[Path]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError.from_os("read", path, error) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no YAML ({shorten(' '.join(str(error).split()), 120)})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} describes no model; expected entries such as `like: longlive`")
    for key in values:
        if key not in Preset.model_fields and key != "like":
            raise InputError(f"{path}: {unknown('entry', key, [*Preset.model_fields, 'like'])}")
    for key in ("transformer", "codec", "text", "tokenizer"):
        if isinstance(values.get(key), str):
            values[key] = _absolute(values[key], path.parent)
    for adapter in values.get("lora") or []:
        if isinstance(adapter, dict) and isinstance(adapter.get("file"), str):
            adapter["file"] = _absolute(adapter["file"], path.parent)
    parent = values.pop("like", None)
    if parent is None:
        return values
    base = _folder() / f"{parent}.yaml" if parent in names() else path.parent / str(parent)
    if base in (*seen, path):
        raise InputError(f"{path}: like: {parent} leads back to itself")
    if parent not in names() and not base.is_file():
        raise InputError(f"{path}: like: {unknown('preset', parent, names())}")
    inherited = _values(base, [*seen, path])
    if "transformer" in values:  # what belongs to the other file's weights does not belong to these
        inherited = {key: value for key, value in inherited.items() if key not in ("part", "lora")}
    return inherited | values


def _absolute(address: str, folder: Path) -> str:
    """A path that exists beside the file, or was meant as one; an address of the Hub stays."""
    path = Path(address).expanduser()
    here = path if path.is_absolute() else folder / path
    return str(here.resolve()) if here.exists() or address.startswith((".", "/", "~")) else address
