"""Models by name: which files make an engine, and the settings a model was trained for.

A model is a folder: model.json (settings), transformer.safetensors, words.safetensors, codec.safetensors, each carrying
its own sizes, and for memories with weights of their own memory.<name>.safetensors, carrying the arguments they were
trained with. The embedded one, `tiny`, is a folder of the package.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from slotmemory.backbones.causal_wan import CausalWan, WanConfig
from slotmemory.codecs.base import check_tensors, read_metadata_json, read_tensors
from slotmemory.codecs.preview import PreviewCodec
from slotmemory.codecs.words import WordEncoder
from slotmemory.engine import Engine
from slotmemory.errors import InputError, shorten, unknown
from slotmemory.layout import Layout
from slotmemory.memory import Memory, build
from slotmemory.sampler import Euler, FewStep, FlowSchedule

# what model.json tells, beside the sizes that the weights carry
SETTINGS = {
    "height": int,
    "width": int,
    "fps": int,
    "shift": int | float,
    "steps": list | int,  # a few-step list, or a number of Euler steps
    "context_noise": int | float,
    "memory": dict,
}


def embedded() -> list[str]:
    """Names of the models inside the package."""
    return sorted(p.parent.name for p in Path(str(files("slotmemory") / "assets")).glob("*/model.json"))


def folder_of(name: str) -> Path:
    """Resolve a model's name or path to its folder."""
    if name in embedded():
        return Path(str(files("slotmemory") / "assets" / name))
    if Path(name).is_dir():
        return Path(name)
    raise InputError(f"{unknown('model', name, embedded())}; or give a folder with model.json")


@cache
def native_dtype() -> torch.dtype:
    """bf16 where the processor multiplies it natively (2 to 3 times fp32's speed there), else fp32."""
    flags = Path("/proc/cpuinfo")
    fast = flags.is_file() and any(f in flags.read_text() for f in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def settings_of(folder: Path) -> dict[str, Any]:
    path = folder / "model.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError.from_os("read", path, error) from None
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error})") from None
    for name, kind in SETTINGS.items():
        value = settings.get(name) if isinstance(settings, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{path}: '{name}' is {shorten(value)}; the file is damaged or another model's")
    return settings


def load_module(module_of, path: Path) -> nn.Module:
    """Build a module from the sizes in a weights file and fill it: module_of(config as JSON text or values)."""
    tensors, metadata = read_tensors(path)
    try:
        module = module_of(read_metadata_json(metadata, "config", path))
    except (TypeError, KeyError, ValueError, AssertionError) as error:
        raise (
            error if isinstance(error, InputError) else InputError(f"{path}: sizes that make no model ({error})")
        ) from None
    check_tensors(tensors, module.state_dict(), path)
    module.load_state_dict(tensors)
    return module


def memory_arguments(path: Path) -> dict[str, Any]:
    """The arguments that a memory's weights were trained with."""
    return read_metadata_json(read_tensors(path)[1], "config", path)


def fill_memory(policy: Memory, path: Path, arguments: dict[str, Any]) -> None:
    """Load a policy's trained weights; InputError where they were trained with other arguments than these."""
    tensors, metadata = read_tensors(path)
    for name, value in read_metadata_json(metadata, "config", path).items():
        if arguments.get(name, value) != value:
            raise InputError(
                f"memory '{policy.called()}': {name}={arguments[name]!r}, but {path} was trained with {name}={value!r}; "
                "leave it out, or give weights=none for untrained ones"
            )
    check_tensors(tensors, policy.state_dict(), path)
    policy.load_state_dict(tensors)


def load(name: str, device: torch.device, dtype: torch.dtype | None = None) -> Engine:
    """Load a model as an engine without a memory (`none`); use `Engine.with_memory` to give it one."""
    folder = folder_of(name)
    settings = settings_of(folder)
    if dtype is None:
        dtype = native_dtype() if device.type == "cpu" else torch.bfloat16

    def ready(module: nn.Module, dtype: torch.dtype) -> nn.Module:
        return module.to(device, dtype).eval().requires_grad_(False)

    backbone = load_module(
        lambda values: CausalWan(WanConfig.from_json(json.dumps(values))), folder / "transformer.safetensors"
    )
    # a few words per prompt cost nothing, and stay exact
    words = load_module(lambda values: WordEncoder(**values), folder / "words.safetensors")
    codec = ready(PreviewCodec.load(folder / "codec.safetensors"), dtype)
    engine = assemble(ready(backbone, dtype), codec, ready(words, torch.float32), settings)
    files = {path.name.split(".")[1]: path for path in folder.glob("memory.*.safetensors")}
    return replace(engine, memory_weights=files)


def assemble(backbone: CausalWan, codec: PreviewCodec, words: WordEncoder, settings: dict[str, Any]) -> Engine:
    """Put trained parts together with the settings they were trained for."""
    config = backbone.config
    layout = Layout(
        settings["height"],
        settings["width"],
        settings["fps"],
        latent_channels=config.in_dim,
        patch=config.patch,
        layers=config.num_layers,
        heads=config.num_heads,
        head_dim=config.head_dim,
        text_tokens=config.text_len,
    )
    steps, schedule = settings["steps"], FlowSchedule(settings["shift"])
    return Engine(
        backbone,
        codec,
        words,
        Euler(steps, schedule) if isinstance(steps, int) else FewStep(tuple(steps), schedule),
        build("none", layout),
        layout,
        settings["context_noise"],
        settings["memory"],
    )


def pack(folder: Path, parts: dict[str, Path], settings: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a model folder from exported weights: parts by name (transformer, words, codec, ...), stored in `dtype`.

    Statistics and other tensors of one axis stay fp32: they are small, and rounding them shows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in parts.items():
        tensors, metadata = read_tensors(path)
        stored = {k: t.to(dtype) if t.is_floating_point() and t.ndim > 1 else t for k, t in tensors.items()}
        partial = folder / f"{name}.safetensors.partial"
        save_file({k: t.contiguous() for k, t in stored.items()}, partial, metadata)
        partial.replace(folder / f"{name}.safetensors")
    (folder / "model.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
