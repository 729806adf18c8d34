"""Attention kernels: which of torch's fused ones work here, and whether they compute what attention is.

Each is run once on a small random example and compared with the plain formula in fp32; one that disagrees is switched
off for the process, with a message. Choosing between those that agree is torch's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

logger = logging.getLogger(__name__)

FUSED: dict[str, tuple[SDPBackend, Callable[[bool], None]]] = {
    "cudnn": (SDPBackend.CUDNN_ATTENTION, torch.backends.cuda.enable_cudnn_sdp),
    "flash": (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.enable_flash_sdp),
    "memory-efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.enable_mem_efficient_sdp),
}
# largest deviation from the formula that rounding of inputs and weights explains, for values of unit variance
TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # fp32: GPUs may multiply it in TF32


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


def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(q k / sqrt D) v in fp32; [B, H, N, D]."""
    q, k, v = (x.float() for x in (query, key, value))
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


@cache
def check(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Kernel, ...]:
    """Compare every fused kernel with the formula, once per process, and switch off those that are wrong."""
    generator = torch.Generator().manual_seed(0)
    # lengths that are no multiple of a tile, as those of a chunk and its memory are not
    query, key, value = (
        torch.randn(1, 2, length, head_dim, generator=generator).to(device, dtype) for length in (75, 203, 203)
    )
    expected, found = formula(query, key, value), []
    for name, (backend, switch) in FUSED.items():
        error = _deviation(backend, query, key, value, expected)
        right = error is None or error <= TOLERANCE.get(dtype, 1e-3)  # NaN is no more than nothing, and so wrong
        if not right:
            switch(False)
            logger.warning(
                "the %s attention kernel is wrong by up to %.1e on %s in %s; it is not used", name, error, device, dtype
            )
        found.append(Kernel(name, error, right))
    return tuple(found)


def _deviation(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, expected: Tensor) -> float | None:
    try:
        with torch.no_grad(), sdpa_kernel([backend]):
            result = F.scaled_dot_product_attention(query, key, value)
    except RuntimeError:  # not built in, or not for this device, type or size
        return None
    return float((result.float() - expected).abs().max())
