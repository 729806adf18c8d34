"""Whether a job fits: what it will take against what is free, and what would make it fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slotmemory import memory as memories
from slotmemory.cli.dry_run import size
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.footprint import Footprint, predict

# what an accelerator's driver, libraries and allocator take beside tensors: half a gigabyte and a twentieth
DRIVER, ROUNDING = 5 * 10**8, 1.05


@dataclass(frozen=True)
class Forecast:
    """What a job takes and what the device has; `free` is None where the system does not tell, `bounded` False where
    the memory keeps to no budget."""

    footprint: Footprint
    device: torch.device
    free: int | None
    bounded: bool = True
    text_on_host: int = 0  # bytes of a text encoder that computes on the processor beside the device

    @property
    def host(self) -> int:
        """Bytes that the processor holds beside the device."""
        return self.footprint.host + self.text_on_host

    @property
    def resting(self) -> str:
        """What they are."""
        named = {"codec and its cache": self.footprint.host, "text encoder, mapped": self.text_on_host}
        return ", ".join(f"{name} {size(count)}" for name, count in named.items() if count)

    @property
    def needed(self) -> int:
        total = self.footprint.total
        return total if self.device.type == "cpu" else int(total * ROUNDING) + DRIVER

    @property
    def fits(self) -> bool:
        return self.free is None or self.needed <= self.free


def forecast(
    engine: Engine,
    name: str,
    budget: int | None,
    arguments: Mapping[str, Any],
    chunks: int,
    device: torch.device,
    text: int = 0,
    text_on_host: int = 0,
) -> Forecast:
    """Forecast a stream. engine: on the device `meta`; name, budget, arguments: of the memory; text: bytes of a text
    encoder that has prompts to encode on the device, text_on_host: on the processor."""
    policy = memories.build(name, engine.layout, budget, **arguments)
    found = predict(engine, policy, chunks, text=text)
    return Forecast(found, device, free_bytes(device), policy.budget is not None, text_on_host)


def refuse(found: Forecast, dtype: torch.dtype) -> None:
    """Raise InputError for a job that cannot fit, with what would make it fit."""
    if found.fits:
        return
    parts = ", ".join(f"{name} {size(count)}" for name, count in found.footprint.parts.items() if count)
    where = "memory" if found.device.type == "cpu" else f"memory on {found.device}"
    raise InputError(
        f"this job needs about {size(found.needed)} of {where} and {size(found.free)} are free ({parts}); "
        f"{advice(found, dtype)}"
    )


def advice(found: Forecast, dtype: torch.dtype) -> str:
    """What would make a job fit, the mildest first."""
    spare = found.free if found.device.type == "cpu" else int((found.free - DRIVER) / ROUNDING)
    tokens, ways = found.footprint.tokens_within(spare), []
    if (
        found.footprint.text
        and found.footprint.text + found.footprint.parts["weights"] > spare >= found.footprint.streaming
    ):
        ways.append("the text encoder is too large beside the weights: use --offload text")
    elif 0 < tokens < found.footprint.tokens:
        other = "" if found.bounded else "another memory, such as --memory sink "
        ways.append(f"{other}--budget {tokens} would fit")
    elif tokens <= 0:
        ways.append("use a smaller picture (options: width, height)")
    if dtype is torch.float32:
        ways.append("--dtype bf16 halves it")
    ways.append(f"or a device with {size(found.needed)} free")
    return ", ".join(ways)


def free_bytes(device: torch.device) -> int | None:
    """Free memory of a device; of the machine for the processor; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(told["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in told else None
