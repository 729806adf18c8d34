"""Bytes: how they are written, and how many this process holds."""

from __future__ import annotations

from pathlib import Path


def size(count: float) -> str:
    """Write bytes in a unit that leaves two or three digits."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.2g} {unit}" if count < 10 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def resident_bytes() -> int | None:
    """Bytes of memory that this process holds now; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(told["VmRSS"].split()[0]) * 1024 if "VmRSS" in told else None
