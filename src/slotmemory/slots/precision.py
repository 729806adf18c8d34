"""Keep the slot mathematics in fp32 whatever surrounds it.

It knows none of that mathematics. In bf16 the recurrence over chunks loses its argmax within tens of chunks and top-R
ranks ties; all of it costs less than a thousandth of a chunk, so nothing is gained by halving it.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import torch
from torch import Tensor, nn

HALVES = (torch.bfloat16, torch.float16)


def full_precision(function: Callable) -> Callable:
    """Run a function with autocast off and its half-precision tensor arguments raised to fp32; fp64 stays fp64."""

    @wraps(function)
    def run(*args, **kwargs):
        args = [_raised(x) for x in args]
        kwargs = {name: _raised(x) for name, x in kwargs.items()}
        devices = {x.device.type for x in (*args, *kwargs.values()) if isinstance(x, Tensor)}
        with _no_autocast(devices):
            return function(*args, **kwargs)

    return run


class FullPrecision(nn.Module):
    """A module whose parameters stay fp32 when the model that holds it is cast to bf16 or fp16."""

    def _apply(self, fn, recurse=True):
        def cast(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            halved = moved.dtype in HALVES and tensor.dtype not in HALVES
            return tensor.to(moved.device) if halved else moved

        return super()._apply(cast, recurse)


def _raised(x):
    return x.float() if isinstance(x, Tensor) and x.dtype in HALVES else x


def _no_autocast(devices: set[str]):
    # Tensors of one call share a device; meta tensors know no autocast.
    device = next((d for d in sorted(devices) if torch.amp.is_autocast_available(d)), None)
    return torch.autocast(device, enabled=False) if device else nullcontext()
