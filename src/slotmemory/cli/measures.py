"""Bytes in words."""


def size(count: float) -> str:
    """Write bytes in a unit that leaves two or three digits."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.2g} {unit}" if count < 10 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
