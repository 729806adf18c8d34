"""Models by name: which files make an engine, and the settings a model was trained for.

A model is a folder of ours (`checkpoints/folder.py`), a preset, or a checkpoint in any layout that `checkpoints` knows.
The embedded one, `tiny`, is a folder of the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slotmemory.backbones import kernels
from slotmemory.backbones.causal_wan import CausalWan
from slotmemory.backbones.compiled import compile_blocks
from slotmemory.backbones.guided import Guided
from slotmemory.backbones.quantise import quantise
from slotmemory.checkpoints.layouts import PUBLISHED
from slotmemory.checkpoints.parts import load_codec, load_text, load_transformer
from slotmemory.checkpoints.presets import Preset
from slotmemory.checkpoints.sources import Sources, resolve
from slotmemory.codecs.base import Codec, check_tensors, read_metadata_json, read_tensors
from slotmemory.codecs.offload import Offloaded
from slotmemory.engine import Engine, Text
from slotmemory.errors import InputError, unknown
from slotmemory.layout import Layout
from slotmemory.memory import Memory, build
from slotmemory.sampler import Euler, FewStep, FlowSchedule

OFFLOADED = ("text", "codec")  # parts that can rest on the processor


def embedded() -> list[str]:
    """Names of the models inside the package."""
    return sorted(p.parent.name for p in Path(str(files("slotmemory") / "assets")).glob("*/model.json"))


def find(name: str) -> Sources:
    """Find a model's files by its name, and fetch what is not on this machine; see `checkpoints.sources.resolve`."""
    if name in embedded():
        return replace(resolve(str(files("slotmemory") / "assets" / name)), name=name)
    return resolve(name, embedded())


@cache
def native_dtype() -> torch.dtype:
    """bf16 where the processor multiplies it natively (2 to 3 times fp32's speed there), else fp32."""
    flags = Path("/proc/cpuinfo")
    fast = flags.is_file() and any(f in flags.read_text() for f in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if fast else torch.float32


def memory_arguments(path: Path) -> dict[str, Any]:
    """The arguments that a memory's weights were trained with."""
    return read_metadata_json(read_tensors(path)[1], "config", path)


def fill_memory(policy: Memory, path: Path, arguments: dict[str, Any]) -> None:
    """Load a policy's trained weights; InputError where they were trained with other arguments than these."""
    tensors, metadata = read_tensors(path)
    for name, value in read_metadata_json(metadata, "config", path).items():
        if arguments.get(name, value) != value:
            raise InputError(
                f"{name}={arguments[name]!r}, but {path} was trained with {name}={value!r}; "
                "leave it out, or give weights=none for untrained ones"
            )
    check_tensors(tensors, policy.state_dict(), path)
    policy.load_state_dict(tensors)


def load(
    name: str,
    device: torch.device,
    dtype: torch.dtype | None = None,
    quant: str | None = None,
    offload: str | None = None,
    compile: bool = False,
    kernel: str | None = None,
) -> Engine:
    """Load a model as an engine without a memory (`none`); use `Engine.with_memory` to give it one.

    quant: "int8" or "fp8" weights; offload: "text", "codec" or "all" of them rest on the processor, where the device is
    another; compile: the blocks' regions; kernel: of attention, see `kernels.use`. On the device `meta` it has shapes and
    no numbers, for `footprint.predict`."""
    named = parts_offloaded(offload)
    away = named if device.type != "cpu" else ()
    sources = find(name)
    if dtype is None:
        dtype = native_dtype() if device.type == "cpu" else torch.bfloat16
    backbone, adapters = load_transformer(sources, device, dtype)
    if quant is not None:
        quantise(backbone, quant)
    codec = place_codec(load_codec(sources.codec).eval().requires_grad_(False), device, dtype, "codec" in away)
    text = load_text(sources.text, sources.tokenizer, backbone.config.text_dim, device, host="text" in away)
    engine = assemble(backbone, codec, text, sources.settings)
    engine = replace(engine, memory_weights=sources.memories, adapters=adapters)
    guidance, negative = sources.settings.get("guidance", 1.0), sources.settings.get("negative", "")
    if device.type == "meta":
        return engine
    kernels.use(kernel, device, dtype, backbone.config.head_dim)
    if compile:
        compile_blocks(backbone)
    if guidance > 1:
        text.check(negative)  # it is encoded with the first prompts
        engine = replace(engine, backbone=Guided(backbone, lambda: text.encode([negative])[0], guidance - 1))
    return engine


def parts_offloaded(offload: str | None) -> tuple[str, ...]:
    """The parts that an `offload` names: "text", "codec" or "all"."""
    if offload not in (None, "all", *OFFLOADED):
        raise InputError(unknown("offload", offload, (*OFFLOADED, "all")))
    return OFFLOADED if offload == "all" else (offload,) if offload else ()


def place_codec(codec: nn.Module, device: torch.device, dtype: torch.dtype, away: bool) -> nn.Module:
    """Put a codec on the device, or let it rest where it is and visit the device for each decode."""
    if not away:
        return codec.to(device, dtype)
    return Offloaded(codec.to(device if device.type == "meta" else "cpu", dtype), device)


def published_shapes(
    preset: Preset, dtype: torch.dtype, quant: str | None = None, offload: str | None = None
) -> Engine:
    """What an engine of a preset's published size would be, on the device `meta`, before its files are here."""
    from slotmemory.codecs.wan_vae import WanVAE

    with torch.device("meta"):
        backbone = CausalWan(PUBLISHED[preset.size or "1.3B"]).to(dtype)
        codec = place_codec(WanVAE.published(), torch.device("meta"), dtype, "codec" in parts_offloaded(offload))
    if quant is not None:
        quantise(backbone, quant)
    return assemble(backbone, codec, None, preset.settings())  # shapes are told no prompt


def assemble(backbone: CausalWan, codec: Codec, text: Text | None, settings: Mapping[str, Any]) -> Engine:
    """Put trained parts together with the settings they were trained for."""
    config = backbone.config
    if codec.latent_channels != config.in_dim:
        raise InputError(
            f"the codec makes {codec.latent_channels} latent channels, the transformer takes {config.in_dim}; they are "
            "parts of different models"
        )
    layout = Layout(
        settings["height"],
        settings["width"],
        settings["fps"],
        spatial_stride=codec.space_stride,
        temporal_stride=codec.time_stride,
        latent_channels=config.in_dim,
        patch=config.patch,
        frames_per_chunk=settings.get("frames_per_chunk", 3),
        layers=config.num_layers,
        heads=config.num_heads,
        head_dim=config.head_dim,
        text_tokens=config.text_len,
    )
    steps, schedule = settings["steps"], FlowSchedule(settings["shift"])
    return Engine(
        backbone,
        codec,
        text,
        Euler(steps, schedule) if isinstance(steps, int) else FewStep(tuple(steps), schedule),
        build("none", layout),
        layout,
        settings["context_noise"],
        settings["memory"],
        any_size=settings.get("any_size", False),
    )
