"""Whether a job fits: what it will take against what is free, and what would make it fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slotmemory import memory as memories
from slotmemory.bench.machine import process_bytes
from slotmemory.cli.measures import size
from slotmemory.engine import Engine
from slotmemory.errors import InputError
from slotmemory.footprint import Footprint, predict

# what an accelerator's driver, libraries and allocator take beside tensors: half a gigabyte and a twentieth
DRIVER, ROUNDING = 5 * 10**8, 1.05
# what a process takes beside tensors once it computes: code of kernels, the video's encoder, pictures at the end;
# 41 and 56 MiB were measured on a processor
FIRST_USE = 5 * 10**7


@dataclass(frozen=True)
class Forecast:
    """What a job takes and what the device has; `free` is None where the system does not tell, `bounded` False where
    the memory keeps to no budget."""

    footprint: Footprint
    device: torch.device
    free: int | None
    bounded: bool = True
    text_on_host: int = 0  # bytes of a text encoder that computes on the processor beside the device
    resident: int | None = None  # bytes that this process holds before it loads anything; None: not told
    reading: int = 0  # most bytes on the processor while files are read: what is mapped, and what is made of it there
    host_free: int | None = None  # free on the processor, where the device is another

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
        """Bytes of the device that have to be free; on the processor beyond what this process holds."""
        total = self.footprint.total
        return total + FIRST_USE if self.device.type == "cpu" else int(total * ROUNDING) + DRIVER

    @property
    def process(self) -> int | None:
        """The most bytes of the processor's memory that the process will hold, mapped files among them; without what a
        device's driver takes there."""
        if self.resident is None:
            return None
        streaming = self.footprint.total if self.device.type == "cpu" else self.host
        return self.resident + FIRST_USE + max(streaming, self.reading)

    @property
    def host_needed(self) -> int:
        """Bytes of the processor's memory that have to be free beside a device."""
        return self.host + FIRST_USE

    @property
    def fits(self) -> bool:
        return self.fits_device and (self.host_free is None or self.host_needed <= self.host_free)

    @property
    def fits_device(self) -> bool:
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
    reading: int = 0,
) -> Forecast:
    """Forecast a stream. engine: on the device `meta`; name, budget, arguments: of the memory; text: bytes of a text
    encoder that has prompts to encode on the device, text_on_host: on the processor; reading: see `Forecast`."""
    policy = memories.build(name, engine.layout, budget, **arguments)
    found = predict(engine, policy, chunks, text=text)
    bounded = policy.budget is not None
    host_free = None if device.type == "cpu" else free_bytes(torch.device("cpu"))
    return Forecast(
        found, device, free_bytes(device), bounded, text_on_host, process_bytes("VmRSS"), reading, host_free
    )


def refuse(found: Forecast, dtype: torch.dtype) -> None:
    """Raise InputError for a job that cannot fit, with what would make it fit."""
    if found.fits:
        return
    parts = ", ".join(f"{name} {size(count)}" for name, count in found.footprint.parts.items() if count)
    where = "memory" if found.device.type == "cpu" else f"memory on {found.device}"
    needed, free = found.needed, found.free
    if found.fits_device:
        parts, where = found.resting or "programs and encoder", f"the processor's memory beside {found.device}"
        needed, free = found.host_needed, found.host_free
    raise InputError(
        f"this job needs about {size(needed)} of {where} and {size(free)} are free ({parts}); {advice(found, dtype)}"
    )


def advice(found: Forecast, dtype: torch.dtype) -> str:
    """What would make a job fit, the mildest first."""
    if found.fits_device:
        kept = "leave out --offload, or " if found.host else ""
        return f"{kept}free {size(found.host_needed - found.host_free)} of the processor's memory"
    spare = found.free - FIRST_USE if found.device.type == "cpu" else int((found.free - DRIVER) / ROUNDING)
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


def told(found: Forecast, dtype: torch.dtype) -> list[str]:
    """Say what a job takes: on its device, then of the processor's memory."""
    footprint, here = found.footprint, found.device.type == "cpu"
    parts = ", ".join(f"{name} {size(count)}" for name, count in footprint.parts.items() if count)
    text = f"; {size(footprint.text)} for the text encoder before it" if footprint.text else ""
    verdict = "it fits" if found.fits else f"it does not fit: {advice(found, dtype)}"
    if found.fits and found.free is None:
        verdict = "the system does not tell what is free"
    taken = f"{size(found.resident)} of them taken now" if found.resident is not None else "what is taken is not told"
    first = f"{size(FIRST_USE)} for first use of kernels and encoders"
    if here:
        whole = found.needed if found.process is None else found.process
        return [
            f"about {size(whole)} of memory at the most ({taken}, {first}; tensors: {parts}{text}); {verdict}",
            *_mapped(found),
        ]
    lines = [f"about {size(found.needed)} on {found.device} ({parts}{text}); {verdict}"]
    if found.process is not None:
        resting = f"; {found.resting}" if found.resting else ""
        lines.append(
            f"about {size(found.process)} of the processor's memory at the most ({taken}, {first}{resting}); "
            "what the device's driver takes there is not measured"
        )
    return [*lines, *_mapped(found)]


def _mapped(found: Forecast) -> list[str]:
    """Say where files that are mapped make the most of it."""
    streaming = found.footprint.total if found.device.type == "cpu" else found.host
    if found.reading <= streaming:
        return []
    return [
        f"{size(found.reading)} of it while weights are read from their files; the system can take back what is mapped"
    ]


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
