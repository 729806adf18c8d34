"""From options to an engine with a session on it, with every default resolved and written down in a recipe."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from slotmemory import memory as memories
from slotmemory.checkpoints.hub import Address
from slotmemory.checkpoints.sources import Sources, absent
from slotmemory.cli.disk import TOKENS_PER_WORD, Disk, forecast_disk, refuse_disk
from slotmemory.cli.fit import Forecast, forecast, refuse
from slotmemory.cli.trial import Trial
from slotmemory.codecs.umt5 import PUBLISHED_BYTES, UMT5
from slotmemory.config import Argument, Generate, check_arguments, generate_options
from slotmemory.engine import Engine
from slotmemory.errors import InputError, shorten
from slotmemory.layout import Layout
from slotmemory.models import find, load, native_dtype, parts_offloaded, published_shapes
from slotmemory.sampler import FewStep
from slotmemory.script import Schedule, Script
from slotmemory.session import Session

T = TypeVar("T")
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
    plan: Plan


@dataclass(frozen=True)
class Plan:
    """What is known before any weights are loaded. `shapes`: the engine on the device `meta`, of the script's size;
    `sources`: None where files of a preset are `missing` here."""

    sources: Sources | None
    missing: Sequence[Address]
    shapes: Engine
    memory: str
    arguments: Mapping[str, Argument]
    schedule: Schedule
    dtype: str
    forecast: Forecast
    disk: Disk
    scale: int  # of the video


def plan(script: Script, options: Generate, fetch: bool = True) -> Plan:
    """Find a model's files and forecast what a job will take; nothing is loaded, and nothing refused for its size.

    fetch: bring what is on the Hub alone; otherwise forecast from the size that a preset is known to have."""
    device = find_device(options.device)
    dtype = options.dtype or dtype_for(device)[0]
    memory = str(Path(options.memory).resolve()) if options.memory.endswith(".py") else options.memory
    policy = memories.find(options.memory)
    check_arguments(options.memory, options.arguments, memories.arguments(policy))

    offload = None if device.type == "cpu" else options.offload  # the processor has nowhere else to let things rest
    sources, missing, shapes = on_shapes(options.model, DTYPES[dtype], options.quant, fetch, offload)
    if options.steps is not None:
        shapes = shapes.with_steps(options.steps)
    shapes = _sized(script, shapes)
    arguments = {**memories.arguments(policy), **shapes.defaults_for(memory, dict(options.arguments))}
    schedule = script.schedule(shapes.layout)
    new, encoder = _to_encode(script, sources, shapes)
    text = 0 if device.type == "cpu" else encoder  # on the processor its weights stay in their file
    on_host, text = (text, 0) if "text" in parts_offloaded(offload) else (0, text)
    reading = max(_reading(sources, shapes, device), encoder + (_transformer(shapes) if device.type == "cpu" else 0))
    found = _explained(
        memory,
        arguments,
        lambda: forecast(shapes, memory, options.budget, arguments, schedule.chunks, device, text, on_host, reading),
    )
    words = sum(len(prompt.split()) for prompt in new)
    embeddings = int(words * TOKENS_PER_WORD) * shapes.modules[0].config.text_dim * torch.bfloat16.itemsize
    scale = options.scale or _scale(shapes.layout)
    disk = forecast_disk(shapes.layout, schedule, found.footprint, scale, options.save_every, embeddings)
    return Plan(sources, missing, shapes, memory, arguments, schedule, dtype, found, disk, scale)


def disk_after(tried: Trial, planned: Plan, options: Generate) -> Disk:
    """Forecast a run's files by what a trial made of them."""
    layout, footprint, embeddings = planned.shapes.layout, planned.forecast.footprint, planned.disk.parts["embeddings"]
    return forecast_disk(layout, planned.schedule, footprint, planned.scale, options.save_every, embeddings, tried)


def _to_encode(script: Script, sources: Sources | None, shapes: Engine) -> tuple[set[str], int]:
    """Prompts that a large text encoder has yet to encode, and the bytes of its weights, 0 where there are none."""
    prompts = {shot.prompt for shot in script.shots}
    if sources is None:
        return prompts, PUBLISHED_BYTES
    if not isinstance(shapes.text, UMT5):  # the embedded model's words are weights like others
        return set(), 0
    new = {prompt for prompt in prompts if not shapes.text.knows(prompt)}
    return new, sources.text_bytes() if new else 0


def _transformer(shapes: Engine) -> int:
    """Bytes of the transformer as it is read, before it is quantised."""
    return sum(tensor.numel() for tensor in shapes.modules[0].parameters()) * shapes.dtype.itemsize


def _reading(sources: Sources | None, shapes: Engine, device: torch.device) -> int:
    """Most bytes on the processor while the transformer is read: the pages of its file that are touched, and beside them,
    where it is to compute on the processor in numbers of another width than the file's, what is made of them."""
    made = _transformer(shapes)
    if sources is None:
        return made
    stored = sources.transformer_bytes()
    other = not 0.75 < stored / made < 1.5  # a file may hold a little more than the transformer
    touched = min(stored, made * torch.float32.itemsize // shapes.dtype.itemsize) if other else min(stored, made)
    return touched + (made if other and device.type == "cpu" else 0)


def on_shapes(
    model: str,
    dtype: torch.dtype,
    quant: str | None = None,
    fetch: bool = True,
    offload: str | None = None,
) -> tuple[Sources | None, Sequence[Address], Engine]:
    """A model's files, those of a preset that are missing here, and its engine on the device `meta`.

    Names and shapes of all tensors are checked. Without `fetch`, files that are missing are taken to be as published."""
    preset, missing = (None, []) if fetch else absent(model)
    if missing:
        return None, missing, published_shapes(preset, dtype, quant, offload)
    sources = find(model)
    return sources, [], load(sources.name, torch.device("meta"), dtype, quant, offload)


def prepare(script: Script, options: Generate, folder: Path | None = None) -> Prepared:
    """Load the model and open a session. Raises InputError for whatever cannot be had, before anything is written.

    folder: where a run will be written, whose disk has to have room; None: nothing will be."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    planned = plan(script, options)
    refuse(planned.forecast, DTYPES[planned.dtype])
    if folder is not None:
        refuse_disk(planned.disk, folder, planned.scale)
    device, memory, arguments = planned.forecast.device, planned.memory, planned.arguments
    dtype, model = DTYPES[planned.dtype], planned.sources.name  # a recipe is read from any working directory
    engine = Engine.from_pretrained(
        model,
        "none",
        steps=options.steps,
        device=device,
        dtype=dtype,
        quant=options.quant,
        offload=options.offload,
        compile=options.compile,
        kernel=options.kernel,
    )
    engine = _sized(script, engine)
    engine = _explained(memory, arguments, lambda: engine.with_memory(memory, options.budget, **arguments))
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
        "scale": planned.scale,
        "save_every": options.save_every,
        "device": str(device),
        "dtype": planned.dtype,
        "quant": options.quant,
        "offload": options.offload,
        "compile": options.compile,
        "kernel": options.kernel,
        "threads": torch.get_num_threads(),
    }
    weights = planned.sources.fingerprint()
    found = {"tokens": engine.memory.budget, "weights": weights, "torch": str(torch.__version__)}
    session = engine.session(script, seed)
    options = generate_options(resolved)
    return Prepared(script, options, engine, session, planned.schedule, {**resolved, **found}, planned)


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


def _explained(name: str, arguments: Mapping[str, Argument], make: Callable[[], T]) -> T:
    """Make something of a memory; its complaints name it and what it was given."""
    try:
        return make()
    except InputError as error:
        told = str(error)  # which names the memory where `build` complains, and not where a policy does
        raise InputError(told if told.startswith("memory '") else f"memory '{name}': {told}") from error
    except (TypeError, ValueError, RuntimeError, ArithmeticError, LookupError) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items()) or "its own arguments"
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
