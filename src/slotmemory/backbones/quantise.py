"""Weights in eight bits: the linear layers inside the blocks, through torchao; everything else stays as it is.

Weights alone are rounded, activations are not: memory halves against bf16. Needs the extra `quant`.
"""

from __future__ import annotations

from torch import nn

from slotmemory.errors import InputError, need_extra, unknown

KINDS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}


def quantise(model: nn.Module, kind: str) -> None:
    """Round the weights of the linear layers in `model.blocks`, in place; kind: int8 or fp8 (e4m3), a scale per row."""
    if kind not in KINDS:
        raise InputError(unknown("kind of eight bits", kind, KINDS))
    torchao = need_extra("torchao.quantization", "quant", f"--quant {kind}")
    torchao.quantize_(model.blocks, getattr(torchao, KINDS[kind])())
