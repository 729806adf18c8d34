"""Attention kernels: which of them work here, whether they compute what attention is, and which one is used.

Torch's fused ones come first (on CUDA cuDNN's, then flash); a kernel of another package is used where it is asked for
(`use`). Each is run once on a small random example and compared with the plain formula in fp32; one that disagrees is
left out for the process, with a message. What is in use holds for the process, as torch's own switches do.

Legend: B batch, N queries, M keys, H heads, D head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from slotmemory.backbones.attention import Attend, Chosen, choose
from slotmemory.errors import InputError, unknown

logger = logging.getLogger(__name__)

FUSED: dict[str, tuple[SDPBackend, Callable[[bool], None]]] = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.enable_cudnn_sdp),
    "flash": (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.enable_flash_sdp),
    "memory-efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.enable_mem_efficient_sdp),
}
# largest deviation from the formula that rounding of inputs and weights explains, for values of unit variance
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # fp32: GPUs may multiply it in TF32


def _flash_attn() -> Attend:
    """FlashAttention 2, package flash_attn."""
    run = import_module("flash_attn").flash_attn_func
    return lambda q, k, v: run(q, k, v, causal=False)


def _flash_attn_3() -> Attend:
    """FlashAttention 3 for Hopper, package flash_attn_interface; some versions also return the log-sum-exp."""
    run = import_module("flash_attn_interface").flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = run(q, k, v, causal=False)
        return made[0] if isinstance(made, tuple) else made

    return attend


def _flex() -> Attend:
    """Torch's flex attention, compiled."""
    run = torch.compile(import_module("torch.nn.attention.flex_attention").flex_attention, dynamic=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attend


# each is made when it is asked for: what it needs may not be installed
OTHERS: dict[str, Callable[[], Attend]] = {"flash_attn": _flash_attn, "flash_attn_3": _flash_attn_3, "flex": _flex}
KERNELS = ("cudnn", "flash", *OTHERS)  # what `use` takes


@dataclass(frozen=True)
class Kernel:
    """One kernel on one device: its largest deviation from the formula, None where it does not run."""

    name: str
    error: float | None
    right: bool

    def __str__(self) -> str:
        if self.error is None:
            return f"{self.name}: not here"
        return f"{self.name}: {'agrees' if self.right else 'WRONG, switched off'} ({self.error:.1e})"


_order: AbstractContextManager | None = None  # torch's kernels in the order of preference, entered for good


def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k / sqrt D) v in fp32; [B, H, N, D]."""
    q, k, v = (x.float() for x in (query, key, value))
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


@cache
def check(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Kernel, ...]:
    """Compare every fused kernel with the formula, once per process, and switch off those that are wrong."""
    query, key, value = _example(device, dtype, head_dim)
    expected, found = formula(query, key, value), []
    for name, (backend, switch) in FUSED.items():
        error = _deviation(backend, query, key, value, expected)
        right = _right(error, dtype)
        if not right:
            switch(False)
            logger.warning(
                "the %s attention kernel is wrong by up to %.1e on %s in %s; it is not used", name, error, device, dtype
            )
        found.append(Kernel(name, error, right))
    return tuple(found)


def use(name: str | None, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Choose the process's kernel: one of KERNELS, None for torch's own. What cannot be had or is wrong is said in a
    warning and not used. Returns the name of what is used, "torch" for torch's choice among those that are right."""
    if name is not None and name not in KERNELS:
        raise InputError(unknown("attention kernel", name, KERNELS))
    right = [kernel.name for kernel in check(device, dtype, head_dim) if kernel.error is not None and kernel.right]
    other = _checked(name, device, dtype, head_dim) if name in OTHERS else None
    choose(other)
    if device.type == "cuda":
        _prefer(sorted(right, key=lambda each: each != name))  # the one that is asked for, then the order of FUSED
    if name is None or name in OTHERS:
        return "torch" if other is None else name
    if name not in right:
        logger.warning("the %s attention kernel does not run on %s in %s; torch chooses", name, device, dtype)
        return "torch"
    return name


def _checked(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> Chosen | None:
    """Make a kernel and compare it with the formula, None with a warning where it does not run or is wrong."""
    query, key, value = (x.transpose(1, 2) for x in _example(device, dtype, head_dim))
    expected = formula(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)
    try:
        run = OTHERS[name]()
        with torch.no_grad():
            error = float((run(query, key, value).float() - expected).abs().max())
    except Exception as reason:  # noqa: BLE001 - packages and compilers fail in ways of their own
        said = " ".join(str(reason).split())[:200] or type(reason).__name__
        logger.warning("the %s attention kernel does not run here (%s); torch's are used", name, said)
        return None
    if not _right(error, dtype):
        logger.warning(
            "the %s attention kernel is wrong by up to %.1e on %s in %s; torch's are used", name, error, device, dtype
        )
        return None
    return Chosen(run, (device.type, dtype, head_dim))


def _prefer(names: list[str]) -> None:
    """Let torch take the first of these that fits, the plain products at last."""
    global _order
    if _order is not None:
        _order.__exit__(None, None, None)
    _order = sdpa_kernel([*(FUSED[name][0] for name in names), SDPBackend.MATH], set_priority=True)
    _order.__enter__()


def _example(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    """Query, key and value [1, 2, N or M, D], of lengths that are no multiple of a tile, as those of a chunk and its
    memory are not."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 2, length, head_dim, generator=generator).to(device, dtype) for length in (75, 203, 203)]


def _right(error: float | None, dtype: torch.dtype) -> bool:
    return error is None or error <= TOLERANCE.get(dtype, 1e-3)  # NaN is no more than nothing, and so wrong


def _deviation(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, expected: Tensor) -> float | None:
    try:
        with torch.no_grad(), sdpa_kernel([backend]):
            result = F.scaled_dot_product_attention(query, key, value)
    except RuntimeError:  # not built in, or not for this device, type or size
        return None
    return float((result.float() - expected).abs().max())
