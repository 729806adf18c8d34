"""How to generate, validated before anything is loaded, and the file that repeats it.

Every default of `slotmemory generate` stands here. Pure data: what a model or a memory's arguments mean is not known.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from slotmemory.errors import InputError, shorten, unknown
from slotmemory.script import MAX_SEED

Argument = bool | int | float | str | None


def cache_folder() -> Path:
    """Where lies what can be made again: SLOTMEMORY_CACHE, else `slotmemory` in the user's folder for such things."""
    named = os.environ.get("SLOTMEMORY_CACHE")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slotmemory"


def launched() -> tuple[int, int, int] | None:
    """This process's number, how many there are, and its number on this machine, where a launcher such as torchrun
    started it; None where it stands alone."""
    told = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if told[0] is None or told[1] is None:
        return None
    try:
        rank, world, local = (int(value) for value in (*told[:2], told[2] or 0))
    except ValueError:
        raise InputError(f"RANK, WORLD_SIZE and LOCAL_RANK are {', '.join(map(str, told))}, expected numbers") from None
    return rank, world, local


class Generate(BaseModel):
    """Everything that decides a run's video beside its script."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: str = "tiny"
    memory: str = "slots"
    arguments: dict[str, Argument] = {}
    budget: int | None = Field(None, ge=0, le=2**31)
    steps: int | list[int] | None = None  # None: what the model was trained for
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    scale: int | None = Field(None, ge=1, le=64)  # None: small videos are enlarged until they are about 640 pixels wide
    save_every: int = Field(10, ge=1, le=2**31)
    device: str | None = None  # None: a GPU where there is one
    dtype: Literal["fp32", "bf16", "fp16"] | None = None  # None: the fastest that loses nothing
    quant: Literal["int8", "fp8"] | None = None  # eight-bit weights in the transformer's blocks
    offload: Literal["text", "codec", "all"] | None = None  # what rests on the processor beside a GPU
    compile: bool = False  # the transformer's blocks
    kernel: Literal["cudnn", "flash", "flash_attn", "flash_attn_3", "flex"] | None = None  # of attention; None: torch's
    threads: int | None = Field(None, ge=1, le=1024)

    @field_validator("steps")
    @classmethod
    def _steps(cls, steps: int | list[int] | None) -> int | list[int] | None:
        if isinstance(steps, list):
            falling = all(after < before for before, after in zip(steps, steps[1:]))
            if not steps or not falling or steps[0] > 1000 or steps[-1] <= 0:
                raise ValueError("expected numbers that fall from at most 1000 to above 0, such as 1000,750,500,250")
        elif steps is not None and not 1 <= steps <= 1000:
            raise ValueError("expected a number of steps from 1 to 1000, or a list such as 1000,750,500,250")
        return steps


def generate_options(values: Mapping[str, Any], source: str = "options") -> Generate:
    """Validate plain values; the first mistake becomes one line that names the option."""
    for key in values:
        if key not in Generate.model_fields:
            raise InputError(f"{source}: {unknown('option', key, Generate.model_fields)}")
    try:
        return Generate.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        said = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{source}: {first['loc'][0]}: {said}, got {shorten(values.get(first['loc'][0]))}") from None


def parse_steps(text: str) -> int | list[int]:
    """Read `20` (so many Euler steps) or `1000,750,500,250` (a few-step list)."""
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        numbers = []
    if not numbers:
        raise InputError(f"--steps {shorten(text)}: expected a number of steps or a list such as 1000,750,500,250")
    return numbers if "," in text else numbers[0]


def parse_arguments(pairs: Iterable[str]) -> dict[str, Argument]:
    """Read memory arguments written `key=value`; values as in YAML."""
    found: dict[str, Argument] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals or not key:
            raise InputError(f"memory argument {shorten(pair)}: expected key=value, such as window=12")
        try:
            value = yaml.safe_load(text) if text.strip() else text
        except yaml.YAMLError:
            value = text
        if not isinstance(value, Argument):
            raise InputError(f"memory argument {key}: expected a single value, got {shorten(text)}")
        found[key] = value
    return found


def check_arguments(memory: str, given: Mapping[str, Argument], defaults: Mapping[str, Any]) -> None:
    """Compare memory arguments with the policy's own by name and by kind of value."""
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    for name, value in given.items():
        if name not in defaults:
            raise InputError(unknown(f"argument of memory '{memory}'", name, defaults))
        kind = type(defaults[name])
        fits = type(value) is kind or (kind is float and type(value) is int) or kind not in kinds
        if not fits:
            expected = f"{kinds[kind]} such as {str(defaults[name]).lower() if kind is bool else defaults[name]}"
            raise InputError(f"memory '{memory}': {name}={shorten(value)}: expected {expected}")
