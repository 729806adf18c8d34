"""From options to an engine with a session on it, with every default resolved and written down in a recipe."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slotmemory import memory as memories
from slotmemory.config import Argument, Generate, check_arguments, generate_options
from slotmemory.engine import Engine
from slotmemory.errors import InputError, shorten
from slotmemory.layout import Layout
from slotmemory.models import find, native_dtype
from slotmemory.sampler import FewStep
from slotmemory.script import Schedule, Script
from slotmemory.session import Session

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Prepared:
    """All that a run needs; `options` has no open value but the budget, `recipe` is what a run folder keeps."""

    script: Script
    options: Generate
    engine: Engine
    session: Session
    schedule: Schedule
    recipe: Mapping[str, Any]


def prepare(script: Script, options: Generate) -> Prepared:
    """Load the model and open a session. Raises InputError for whatever cannot be had, before anything is written."""
    device = find_device(options.device)
    dtype = options.dtype or dtype_for(device)[0]
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    sources = find(options.model)
    model = sources.name  # a recipe is read from any working directory
    memory = str(Path(options.memory).resolve()) if options.memory.endswith(".py") else options.memory
    policy = memories.find(options.memory)
    check_arguments(options.memory, options.arguments, memories.arguments(policy))

    engine = Engine.from_pretrained(model, "none", steps=options.steps, device=device, dtype=DTYPES[dtype])
    engine = _sized(script, engine)
    arguments = {**memories.arguments(policy), **engine.defaults_for(memory, dict(options.arguments))}
    engine = _with_memory(engine, memory, options.budget, arguments)
    seed = options.seed
    if seed is None:
        seed = secrets.randbelow(2**31)
    sampler = engine.sampler
    resolved = {
        "model": model,
        "memory": memory,
        "arguments": arguments,
        "budget": options.budget,
        "steps": list(sampler.steps) if isinstance(sampler, FewStep) else sampler.count,
        "seed": seed,
        "scale": options.scale or _scale(engine.layout),
        "save_every": options.save_every,
        "device": str(device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
    }
    found = {"tokens": engine.memory.budget, "weights": sources.fingerprint(), "torch": str(torch.__version__)}
    options = generate_options(resolved)
    session = engine.session(script, seed)
    return Prepared(script, options, engine, session, script.schedule(engine.layout), {**resolved, **found})


def find_device(name: str | None) -> torch.device:
    """Resolve a device, or choose a GPU where there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = shorten(str(error).split("\n")[0].rstrip("."), 120)
        raise InputError(f"device '{shorten(name)}' cannot be used here ({reason}); use cpu") from None
    return device


def dtype_for(device: torch.device) -> tuple[str, str]:
    """The dtype used unless one is asked for, and why."""
    if device.type != "cpu":
        return "bf16", "a GPU multiplies it natively"
    if native_dtype() is torch.bfloat16:
        return "bf16", "this processor multiplies it natively"
    return "fp32", "this processor does not multiply bf16 natively"


def _with_memory(engine: Engine, name: str, budget: int | None, arguments: Mapping[str, Argument]) -> Engine:
    try:
        return engine.with_memory(name, budget, **arguments)
    except InputError as error:
        raise InputError(f"memory '{name}': {error}") from error
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        said = f"{type(error).__name__}: {shorten(str(error), 120)}"
        raise InputError(f"memory '{name}' cannot be made with {given}: {said}") from error


def _sized(script: Script, engine: Engine) -> Engine:
    """The engine for the size that the script asks for; a model that was trained for one size makes no other."""
    layout = engine.layout
    asked = {name: script.options.get(name, getattr(layout, name)) for name in ("width", "height")}
    other = [name for name, size in asked.items() if size != getattr(layout, name)]
    if not other:
        return engine
    if not engine.any_size:
        raise InputError(
            f"options: {other[0]}: this model makes {layout.width}x{layout.height} pixels, got {asked[other[0]]}; "
            "leave it out and enlarge with --scale"
        )
    return engine.with_layout(**asked)


def _scale(layout: Layout) -> int:
    """How much a video is enlarged unless it is asked for: small ones until they are about 640 pixels wide."""
    return max(1, 640 // layout.width)
