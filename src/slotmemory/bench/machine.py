"""What a machine does and holds: its measured matrix rate, peaks of memory, and the operations that a chunk calls for."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from slotmemory.backbones.causal_wan import WanConfig

MATRIX = {"cuda": 8192, "cpu": 1024}  # side of the square matrices whose product is timed


def hardware(device: torch.device) -> str:
    """What computes, by its maker's name where the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def synchronised(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_rate(device: torch.device, dtype: torch.dtype, repeats: int = 10) -> float:
    """Floating-point operations per second of a large matrix product, the best of a few."""
    side = MATRIX.get(device.type, MATRIX["cpu"])
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(repeats + 1):
        begun = synchronised(device)
        torch.mm(a, b)
        best = min(best, synchronised(device) - begun)
    return 2 * side**3 / best


def operations(config: WanConfig, tokens: int, read: int, passes: int) -> int:
    """Floating-point operations of a chunk of `tokens` in the transformer, each pass of which attends to `read` more.

    Counted: projections of both attentions, feed-forward, the products of attention, patch embedding and head. Not: norms,
    a prompt's keys (once per prompt), and what a memory computes by itself."""
    width, channels = config.dim, config.patch[1] * config.patch[2] * (config.in_dim + config.out_dim)
    linear = 6 * width**2 + 2 * width * config.ffn_dim
    attended = 2 * width * (tokens + read + config.text_len)
    return 2 * passes * tokens * (config.num_layers * (linear + attended) + width * channels)


def forget_peaks(device: torch.device) -> None:
    """Begin anew with peaks of memory; of the process where the system can."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def peaks(device: torch.device) -> dict[str, int | None]:
    """Most bytes since `forget_peaks`: of tensors on the device, None for the processor, and of the process."""
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"device": on_device, "host": process_bytes("VmHWM")}


def process_bytes(name: str) -> int | None:
    """Bytes of memory of this process by the system's name for them: VmRSS, what it holds now, or VmHWM, its peak.

    None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(told[name].split()[0]) * 1024 if name in told else None


def percentile(values: Sequence[float], share: float) -> float:
    return sorted(values)[round(share * (len(values) - 1))]
