"""Tensors recorded from the published programs (tests/golden), and the tiny model they were recorded with."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from slotmemory.backbones.causal_wan import CausalWan, WanConfig

GOLDEN = Path(__file__).parent / "golden"


@cache
def tensors(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


@cache
def facts(name: str) -> dict:
    return json.loads((GOLDEN / f"{name}.json").read_text())


@cache
def wan() -> CausalWan:
    config = facts("causal_weights")["model_config"]
    names = (
        "dim",
        "ffn_dim",
        "num_heads",
        "num_layers",
        "freq_dim",
        "text_dim",
        "text_len",
        "in_dim",
        "out_dim",
        "eps",
    )
    model = CausalWan(WanConfig(**{k: config[k] for k in names}, patch=tuple(config["patch_size"])))
    model.load_state_dict(tensors("causal_weights"), strict=True)
    return model.eval().requires_grad_(False)


def frame_major(x: torch.Tensor) -> torch.Tensor:
    """[B, C, F, h, w] as the published models take it -> [B, F, C, h, w]."""
    return x.transpose(1, 2)
