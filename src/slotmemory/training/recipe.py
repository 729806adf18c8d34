"""A training recipe: a short YAML file, validated before any work starts.

Every default lives in these definitions. An objective's own section (`options:`) is defined by the `Options` model in
the objective's file; this module only finds it. It does not know what any option means.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from slotmemory.errors import InputError, shorten, unknown


class Frozen(BaseModel):
    """A part of a recipe: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def check(self, recipe: Recipe) -> None:
        """Raise ValueError where the rest of the recipe contradicts this part; an objective's `Options` are asked."""


class Optimizer(Frozen):
    """AdamW everywhere, or Muon for the matrices an objective names (all 2-D weights by default) if `muon` is set."""

    learning_rate: float = Field(1e-3, gt=0, description="AdamW's")
    muon: float | None = Field(None, gt=0, description="Muon's learning rate; none: AdamW for every weight")
    muon_adjust: Literal["original", "match_rms_adamw"] = "original"
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.0, ge=0)
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's")
    clip: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    warmup: int = Field(100, ge=0, description="steps of linear warm-up")
    decay: float = Field(0.2, ge=0, le=1, description="last fraction of the run, in which rates fall to 0")
    decay_by: Literal["steps", "minutes"] = Field("steps", description="what that fraction is counted in")


class Recipe(Frozen):
    """How to train one objective. `batch` counts the samples of a step, over all processes and accumulated calls."""

    objective: str
    steps: int = Field(ge=0)
    max_minutes: float | None = Field(None, gt=0, description="training time of the whole run, resumed parts included")
    batch: int = Field(8, ge=1)
    seed: int = Field(0, ge=0)
    processes: int = Field(1, ge=1)
    accumulate: int = Field(1, ge=1, description="calls of the loss whose gradients add up to a step")
    shard: Literal["none", "fsdp"] = Field("none", description="fsdp: every process keeps a share of the transformers")
    sequence_parallel: int = Field(1, ge=1, description="processes that share the tokens of the same samples")
    threads: int = Field(1, ge=1, description="per process")
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    ema: float = Field(0.999, ge=0, lt=1)
    ema_from: int = Field(0, ge=0, description="step from which weights are averaged; 0: from the first, lengthening")
    optimizer: Optimizer = Optimizer()
    checkpoint_minutes: float = Field(5.0, gt=0)
    checkpoint_steps: int | None = Field(None, ge=1, description="also after every so many steps")
    validate_steps: int = Field(500, ge=1)
    sample_steps: int = Field(500, ge=1)
    print_seconds: float = Field(10.0, ge=0)
    init: str | None = Field(None, description="exported weights to start from: a run folder or a .safetensors file")
    options: SerializeAsAny[BaseModel]

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.processes % self.sequence_parallel:
            raise ValueError(
                f"processes={self.processes} do not divide into groups of sequence_parallel={self.sequence_parallel}"
            )
        if self.batch % (self.processes // self.sequence_parallel * self.accumulate):
            into = {"processes": self.processes, "accumulate": self.accumulate}
            into |= {"sequence_parallel": self.sequence_parallel} if self.sequence_parallel > 1 else {}
            told = " and ".join(f"{name}={count}" for name, count in into.items() if count > 1)
            raise ValueError(f"batch={self.batch} does not divide among {told}")
        if self.optimizer.decay_by == "minutes" and self.max_minutes is None:
            raise ValueError("optimizer.decay_by=minutes needs max_minutes")
        if isinstance(self.options, Frozen):
            self.options.check(self)
        return self

    @property
    def samples(self) -> int:
        """Samples of one call of the loss in one process."""
        return self.batch // (self.processes // self.sequence_parallel * self.accumulate)


def find_objective(name: str) -> ModuleType:
    """Import the objective called `name`: training/<name>.py, or a path to a .py file outside the package."""
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"objective {name}: no such file")
        key = f"slotmemory_objective:{path.resolve()}"
        if key not in sys.modules:
            spec = importlib.util.spec_from_file_location(key, path)
            # Registered before it runs: pydantic looks annotations up there.
            sys.modules[key] = importlib.util.module_from_spec(spec)
            try:
                spec.loader.exec_module(sys.modules[key])
            except BaseException:
                del sys.modules[key]
                raise
        module = sys.modules[key]
    else:
        known = objectives()
        if name not in known:
            raise InputError(unknown("objective", name, known))
        module = importlib.import_module(f"slotmemory.training.{name}")
    for part in ("Options", "Objective"):
        if part not in vars(module):
            raise InputError(f"objective {name} has no class {part}; an objective's file defines Options and Objective")
    return module


def objectives() -> list[str]:
    """Names of the objectives in this package: the files that define a class Objective of their own."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return [f.stem for f in files if re.search(r"^class Objective\((?!ABC)", f.read_text("utf-8"), re.M)]


def parse_recipe(values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe given as plain values; InputError in one line."""
    values = dict(values)
    check_keys(Recipe, values, source)
    if "objective" not in values:
        raise InputError(f"{source}: objective is missing; known: {', '.join(objectives())}")
    options_model = find_objective(str(values["objective"])).Options
    options = values.get("options") or {}
    if not isinstance(options, options_model):
        values["options"] = validate(options_model, options, f"{source}: options")
    return validate(Recipe, values, source)


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe; overrides: {"optimizer.clip": 0.5} or ["optimizer.clip=0.5", ...]."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError.from_os("read", path, error) from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"{path} is no YAML: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds {type(values).__name__}, expected keys and values")
    if not isinstance(overrides, Mapping):
        overrides = dict(_parse_override(text) for text in overrides)
    for key, value in overrides.items():
        part = values
        *parents, last = key.split(".")
        for parent in parents:
            part = part.setdefault(parent, {})
            if not isinstance(part, dict):
                raise InputError(f"override {key}: {parent} has no keys of its own")
        part[last] = value
    return parse_recipe(values, str(path))


def dump_recipe(recipe: Recipe) -> str:
    """Write the resolved recipe as YAML that `load_recipe` reads back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def validate(model: type[BaseModel], values: Any, source: str) -> Any:
    """Validate `values`; the first mistake becomes a one-line InputError naming the key."""
    check_keys(model, values, source)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        given = f", got {shorten(first['input'])}" if key and first["type"] != "missing" else ""
        said = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{source}: {key + ': ' if key else ''}{said}{given}") from None


def check_keys(model: type[BaseModel], values: Any, source: str) -> None:
    """Reject a key that `model` or a model inside it does not have, naming the nearest that it has."""
    if isinstance(values, model):
        return
    if not isinstance(values, Mapping):
        raise InputError(f"{source} is {shorten(values)}, expected keys and values")
    for key, value in values.items():
        if key not in model.model_fields:
            raise InputError(f"{source}: {unknown('key', key, model.model_fields)}")
        annotation = model.model_fields[key].annotation
        for inner in (annotation, *get_args(annotation)):
            if isinstance(inner, type) and issubclass(inner, Frozen) and isinstance(value, Mapping):
                check_keys(inner, value, f"{source}: {key}")


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"override {text!r} is not key=value")
    return key.strip(), yaml.safe_load(value)
